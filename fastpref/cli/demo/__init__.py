"""`fastpref demo`: the first real run, from scored samples to a trained model. run.py is where to start reading."""
