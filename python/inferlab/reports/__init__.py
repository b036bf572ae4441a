"""Reports: tables and plots made of results, as lines, Markdown and HTML."""
