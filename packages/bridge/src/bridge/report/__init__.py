"""The report of a validation: sentences, tables and figures from one record of evidence, as HTML and Markdown."""
