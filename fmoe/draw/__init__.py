"""Pictures, made by matplotlib (the extra `fmoe[draw]`): layouts of experts, bytes by layer and kind, expert load.

    layout(adapter)     the expert tensors of every Hugging Face layout and of the native one, side by side
    checkpoint(path)    the same for a directory, with a bar of bytes for each layer
    load(counts)        how many tokens each expert of each layer was given, as a heat map
    save(figure, file)  .svg, .png, .pdf or .html

All are made from names, shapes and counts: no tensor is read.
"""

from fmoe.draw.figures import checkpoint, layout, load
from fmoe.draw.files import save
from fmoe.entrance import held

__all__ = ["checkpoint", "layout", "load", "save"]

held(globals())
