"""Predicts what a run needs before anything is downloaded or loaded: ``trainer plan``.

Nothing is modelled by formulas that could drift from the code: the model is built without contents, the
plugins wrap it, and one optimiser step of the real code runs over it while every tensor is weighed.
"""
