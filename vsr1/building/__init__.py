"""From annotations and videos to all that training reads: `vsr1 data build`.

`flags` says what can be asked for, `steps` does it, `queries` embeds the texts, and `standing` knows what was made of what,
so that nothing is made twice and nothing stale is used.
"""
