"""Families of experts one by one, with routers and shared experts under names of their own."""
