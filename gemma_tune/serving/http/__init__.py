"""Serves an engine over HTTP: OpenAI's API, metrics, and a chat page. Needs `pip install 'gemma-tune[serve]'`.

A request passes `access_control`, is parsed by `schema`, and becomes requests to the engine in
`engine_requests`. `pending_answers` brings the answers' deltas from the engine's thread, and `reply_builder` makes the
reply of them, whole or as an event stream. `served_models` says what is served, and `app` puts everything together.
"""
