"""One small file per part."""
