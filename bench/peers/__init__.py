"""Other runtimes, behind the same session protocol, to be measured side by side."""
