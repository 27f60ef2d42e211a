"""Personal adapters, as shared by learning, devices and federation."""
