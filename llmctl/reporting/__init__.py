"""What `llmctl report` draws with: reading a run, charts, and one file a section of the page.

Standard library only. Every text from an artifact is untrusted: markup.tag escapes whatever is not Html.
"""
