"""What `serve.py` is made of. No file here imports Keras or TensorFlow."""
