"""An engine behind HTTP: OpenAI's API, metrics, and a page to chat on. Needs `pip install 'gemma-tune[serve]'`.

`service` says what is served, `schema` and `replies` what is asked and answered, `prompts` goes from the one to the
engine's requests and `answers` from its pieces to the other, `gates` keeps out what must not come in, and `app` puts
them together.
"""
