"""The report of a validation: sentences, tables and figures, as HTML and Markdown."""
