"""An OpenAI-compatible server, and a page that shows the vote of each step."""
