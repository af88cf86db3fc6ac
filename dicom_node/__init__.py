"""A DICOM node beside the HTTP service."""
