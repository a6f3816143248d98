"""Jobs that make or change models, each a function and a script of about a screen."""
