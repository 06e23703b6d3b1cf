"""Tools in Gemma's text: how they are declared, called and answered, and how calls are read."""
