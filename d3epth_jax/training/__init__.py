"""From a config to a trained model.

train.py is the loop, steps.py its step, and stages/ are the losses. Of what a config names,
model_setup.py makes the models, training_data.py the batches, from_config.py the rest; runs.py is
what a workdir says of its run. The job of cache.py keeps what a teacher teaches, that of
ablation.py trains many models and compares them.
"""
