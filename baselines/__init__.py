"""The approaches MoBiLE is compared with, one Strategy a file."""
