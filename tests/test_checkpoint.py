"""Directories: HF -> native -> HF gives back every file byte for byte; what is wrong is refused and nothing is left."""

import json
import os
import resource
import shutil
import weakref
from pathlib import Path

import hf
import hf_synthetic as synthetic
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fmoe
from fmoe.checkpoint import convert, inspect, open_checkpoint, verify
from fmoe.checkpoint import convert as package  # noqa: F401
from fmoe.checkpoint.files import INDEX, NATIVE
from fmoe.checkpoint.writer import Writer
from fmoe.pipeline import Plan

PER, FUSED = {"layout": "per_expert"}, {"layout": "fused"}
