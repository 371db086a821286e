"""From a config to a trained model.

train.py is the loop, steps.py its step, and stages/ are the losses. from_config.py makes what a
config names, training_data.py its batches; runs.py is what a workdir says of its run. The job of
cache.py keeps what a teacher teaches, that of ablation.py trains many models and compares them.
"""
