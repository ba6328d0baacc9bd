"""The real `openai` client against a server over a tiny checkpoint: one line per fact, exit code 1 if one does not hold.

python openai_client.py path/to/flotilla-worker [path/to/checkpoint]
"""

import base64
import contextlib
import json
import pathlib
import struct
import subprocess
import sys
import tempfile
import zlib

import openai

CHECKPOINT = pathlib.Path(__file__).parent.parent / "parity/fixtures/tiny-qwen2.5-vl"
MODEL = "tiny"
KEY = "a-key-of-this-test"
RARE_KEY = "a-key-that-may-ask-once"
failures = 0


def fact(name, holds, seen=""):
    global failures
    failures += not holds
    print(f"{'ok  ' if holds else 'FAIL'} {name}" + ("" if holds else f": {seen!r}"), flush=True)


@contextlib.contextmanager
def server(worker, checkpoint, *arguments):
    """A client of a server that runs within the block."""
    command = [worker, "serve", "--model", checkpoint, "--served-model-name", MODEL, "--listen", "127.0.0.1:0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            sys.exit(f"{' '.join(map(str, command))} does not listen: {line!r}")
        client = openai.OpenAI(base_url=line.split()[-1] + "/v1", api_key=KEY, max_retries=0, timeout=120)
        while True:
            try:
                client.models.list()
                break
            except openai.InternalServerError as error:
                if error.code != "loading":
                    raise
        yield client
    finally:
        process.terminate()
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()


def refused(name, kind, call, code=None):
    """The error of a call that must fail in this way."""
    try:
        call()
    except kind as error:
        fact(name, code is None or error.code == code, error.body)
        return error
    except openai.OpenAIError as error:
        fact(name, False, error)
    else:
        fact(name, False, "no error")
    return None


def png(width, height):
    """A grey ramp."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + bytes(min(255, 9 * x + 5 * y) for x in range(width)) for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def ask(text, images=()):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if images else text}]


def chat(client, text="What is this?", images=(), **fields):
    fields = {"model": MODEL, "max_tokens": 24, "seed": 7, **fields}
    return client.chat.completions.create(messages=ask(text, images), **fields)


def whole_answers(client):
    answer = chat(client)
    choice = answer.choices[0]
    fact("chat answers as the assistant", choice.message.role == "assistant", answer)
    fact("chat counts its tokens", answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens, answer.usage)
    fact("a choice ends by stop or length", choice.finish_reason in ("stop", "length"), choice)
    fact("a choice tells the versions of its weights", set(choice.weight_version) == {"begun", "ended"}, choice)
    again = chat(client)
    fact("the same seed gives the same text", again.choices[0].message.content == choice.message.content, again)
    other = chat(client, seed=8)
    fact("another seed gives another text", other.choices[0].message.content != choice.message.content, other)
    texts = [choice.message.content for choice in chat(client, n=4).choices]
    fact("n gives so many different choices", len(set(texts)) == 4, texts)
    fact("the first of n is the only one of one", texts[0] == choice.message.content, texts)
    cold = chat(client, temperature=0).choices[0].message.content
    narrow = chat(client, temperature=1.5, extra_body={"top_k": 1}).choices[0].message.content
    fact("top_k 1 is the most likely text", cold == narrow, (cold, narrow))


def streams(client):
    whole = chat(client, n=2)
    chunks = list(chat(client, n=2, stream=True, stream_options={"include_usage": True}))
    texts, reasons, greeted = ["", ""], [None, None], []
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.delta.role:
                greeted.append(choice.index)
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    fact("a stream gives the text of the whole answer", texts == [choice.message.content for choice in whole.choices], texts)
    fact("a stream greets once for each choice", sorted(greeted) == [0, 1], greeted)
    fact("a stream tells its reasons", reasons == [choice.finish_reason for choice in whole.choices], reasons)
    fact("a stream ends with the token counts", chunks[-1].usage == whole.usage and not chunks[-1].choices, chunks[-1])
    # A choice, because this helper of the client raises an error where the length ends a text.
    choice = {"guided_choice": ["Answer 1 is better", "Answer 2 is better"]}
    with client.chat.completions.stream(model=MODEL, messages=ask("Which?"), seed=7, extra_body=choice) as events:
        final = events.get_final_completion()
    plain = chat(client, "Which?", extra_body=choice)
    fact("the client's own accumulation agrees", final.choices[0].message.content == plain.choices[0].message.content, final)


def stops(client):
    text = chat(client, max_tokens=60).choices[0].message.content
    stop = text[10:13]
    cut = chat(client, max_tokens=60, stop=[stop, "never said"]).choices[0]
    fact("a stop string ends the text before it", cut.message.content == text[: text.index(stop)], (text, stop, cut))
    fact("and is the reason", cut.finish_reason == "stop", cut)
    pieces = [c.choices[0].delta.content or "" for c in chat(client, max_tokens=60, stop=stop, stream=True)]
    fact("a stream never shows a stop string", "".join(pieces) == cut.message.content, pieces)


def log_probabilities(client):
    choice = chat(client, logprobs=True, top_logprobs=4, temperature=0).choices[0]
    content = choice.logprobs.content
    fact("each token has its alternatives, the best first", all(
        len(token.top_logprobs) == 4 and token.top_logprobs[0].logprob == token.logprob for token in content), content)
    spoken = b"".join(bytes(token.bytes) for token in content)
    fact("the tokens' bytes are the text", spoken.decode(errors="replace").startswith(choice.message.content), spoken)
    banned = content[0].token_id
    other = chat(client, logprobs=True, temperature=0, logit_bias={str(banned): -100}).choices[0].logprobs.content[0]
    fact("a bias of -100 bans a token", other.token_id != banned, other)


def pictures(client):
    one = chat(client, images=[png(56, 56)])
    fact("a picture takes tokens", one.usage.prompt_tokens > chat(client).usage.prompt_tokens, one.usage)
    two = chat(client, images=[png(56, 56), png(84, 28)])
    fact("two pictures take more", two.usage.prompt_tokens > one.usage.prompt_tokens, two.usage)
    error = refused("an unreadable picture is a bad request", openai.BadRequestError,
                    lambda: chat(client, images=["data:image/png;base64,AAAA"]))
    fact("and the reason is told", error is not None and "image" in error.message, error)


def constraints(client):
    schema = {
        "type": "object",
        "properties": {
            "verdict": {"enum": ["first", "second", "tie"]},
            "score": {"type": "integer", "minimum": 0, "maximum": 10},
            "reason": {"type": "string", "maxLength": 12},
        },
        "required": ["verdict", "score", "reason"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "judgement", "schema": schema, "strict": True}}
    for seed in range(4):
        choice = chat(client, response_format=form, max_tokens=300, seed=seed).choices[0]
        value = json.loads(choice.message.content) if choice.finish_reason == "stop" else {}
        fact(f"json_schema output parses and is of the schema (seed {seed})",
             set(value) == set(schema["required"]) and value["verdict"] in ("first", "second", "tie")
             and value["score"] in range(11) and len(value["reason"]) <= 12, choice)
    said = chat(client, extra_body={"guided_choice": ["Answer 1", "Answer 2"]}).choices[0].message.content
    fact("guided_choice says one of its texts", said in ("Answer 1", "Answer 2"), said)
    said = chat(client, extra_body={"structured_outputs": {"regex": "[0-9]{2}:[0-9]{2}"}}).choices[0].message.content
    fact("a regular expression is matched", len(said) == 5 and said[2] == ":", said)
    broken = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    error = refused("a broken schema is a bad request", openai.BadRequestError, lambda: chat(client, response_format=broken))
    fact("which names the field", error is not None and error.param == "response_format", error and error.body)


def completions(client):
    def complete(prompt, **fields):
        return client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, seed=7, **fields)

    one = complete("The colour is")
    both = complete(["The colour is", "A box"])
    fact("completions continue a text", one.choices[0].finish_reason in ("stop", "length"), one)
    fact("and several texts as each alone", both.choices[0].text == one.choices[0].text and len(both.choices) == 2, both)
    ids = complete([10, 11, 12])
    fact("and token ids", ids.usage.prompt_tokens == 3, ids.usage)
    streamed = "".join(choice.text for chunk in complete("The colour is", stream=True) for choice in chunk.choices)
    fact("a streamed completion is the whole one", streamed == one.choices[0].text, streamed)
    told = complete("The colour is", logprobs=3).choices[0].logprobs
    fact("log-probabilities come for each token", len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs), told)
    refused("echo is refused by name", openai.BadRequestError, lambda: complete("a", echo=True), "invalid_value")


def models_and_errors(client):
    listed = client.models.list().data
    fact("the model is listed", [model.id for model in listed] == [MODEL], listed)
    fact("and found by its name", client.models.retrieve(MODEL).id == MODEL)
    refused("another model is not found", openai.NotFoundError, lambda: client.models.retrieve("gpt-4"), "model_not_found")
    refused("nor is it asked", openai.NotFoundError, lambda: chat(client, model="gpt-4"), "model_not_found")
    refused("a temperature below 0 is a bad request", openai.BadRequestError, lambda: chat(client, temperature=-1), "invalid_value")
    refused("tools are refused", openai.BadRequestError, lambda: chat(client, tools=[
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]), "invalid_value")
    refused("a prompt that is too long is a bad request", openai.BadRequestError,
            lambda: chat(client, "word " * 9000), "context_length_exceeded")


def access(worker, checkpoint):
    with tempfile.TemporaryDirectory() as directory:
        def line(key, *limits):
            command = [worker, "hash-key", *limits]
            return subprocess.run(command, input=key, stdout=subprocess.PIPE, text=True, check=True).stdout.strip() + "\n"

        keys = pathlib.Path(directory) / "keys"
        keys.write_text(line(KEY, "--name", "often") + line(RARE_KEY, "--name", "rare", "--rate", "1/h"))
        with server(worker, checkpoint, "--api-key-file", keys) as client:
            fact("the right key is let in", chat(client, max_tokens=2).object == "chat.completion")
            stranger = client.with_options(api_key="another")
            refused("a wrong key is an authentication error", openai.AuthenticationError, lambda: chat(stranger))
            rare = client.with_options(api_key=RARE_KEY)
            chat(rare, max_tokens=2)
            refused("a key that asks too often gets a rate limit error", openai.RateLimitError, lambda: chat(rare))
    with server(worker, checkpoint, "--max-queue", "0") as client:
        error = refused("a full queue is a rate limit error", openai.RateLimitError, lambda: chat(client), "overloaded")
        fact("which says when to come back", error is not None and int(error.response.headers["retry-after"]) > 0, error)


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    worker, checkpoint = sys.argv[1], pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else CHECKPOINT
    with server(worker, checkpoint) as client:
        for part in (whole_answers, streams, stops, log_probabilities, pictures, constraints, completions, models_and_errors):
            part(client)
    access(worker, checkpoint)
    print(f"{failures} facts do not hold" if failures else "all facts hold")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
