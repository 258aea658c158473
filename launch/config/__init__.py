"""Configuration: from gin files to the records of a run."""
