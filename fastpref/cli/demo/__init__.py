"""`fastpref demo`: a first run, from scored samples to a trained model. Reading starts at run.py."""
