"""Phones and other devices: model files that they read, train and send back."""
