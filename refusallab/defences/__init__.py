"""Defences: prompts, filters, monitors, steering, trained models. All keep to `refusallab.defence.Defence`."""
