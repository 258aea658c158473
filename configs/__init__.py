"""Gin files: `base.gin` lists every knob; leaves set upper-case macros."""
