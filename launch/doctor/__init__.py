"""Whether a machine is fit to run Switchyard, and what to change if it is not."""
