"""From folders on disk to a running engine: load, check, test that steering takes."""
