"""A configuration, shrunk, is run on a mesh and on one device: are they the same?"""
