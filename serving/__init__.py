"""What `serve.py` is made of: no file here imports Keras or TensorFlow."""
