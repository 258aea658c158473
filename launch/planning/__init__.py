"""Answers, without the hardware: does a run fit, how fast is it, what does it cost?"""
