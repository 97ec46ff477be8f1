"""Submissions that find the channel to the referee and write messages of their own."""

from hostile.bank import Hostile, wrong

FORGE = '''
def channels():
    """The sockets that this process has."""
    for fd in range(256):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                yield fd

def message(tree, tensors=(), data=b""):
    head = json.dumps({"__metadata__": {"tree": tree}, **dict(tensors)}).encode()
    body = struct.pack("<Q", len(head)) + head + data
    return struct.pack("<Q", len(body)) + body

def put(data):
    for fd in channels():
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view[:65536]):]

def result(value):
    return ('{"dict": [["value", %s], ["call", 1], ["changed", {"dict": []}]]}' % value)

def one(kind, shape, size):
    return {"0": {"dtype": kind, "shape": shape, "data_offsets": [0, size]}}

TENSOR = '{"tensor": "0", "grad": true}'
'''


def forged(name: str, tries: str, body: str, **more) -> Hostile:
    return wrong(name, tries, body, FORGE, **more)


def sent(name: str, tries: str, text: str, **more) -> Hostile:
    """Sends one thing in the place of its reply, and ends."""
    return forged(name, tries, f"put({text}); os._exit(0)", **more)


SUBMISSIONS = [
    forged("forged_value", "answers log 2 by its own hand", """
        put(message(result("0.6931471805599453")))
        """),
    forged("forged_verdict", "says what it would like to hear", """
        put(message('{"dict": [["passed", true], ["score", 3], ["status", "right"]]}'))
        """),
    forged("flood", "sends more than anybody reads", """
        while True: put(message(result("0.0")))
        """, hangs=True),
    sent("endless_length", "a message of 2 ** 62 bytes", "struct.pack('<Q', 1 << 62)",
         status="stopped"),
    forged("half_a_message", "half a message, then silence", """
        put(message(result("0.0"))[:40]); time.sleep(1e6)
        """, hangs=True, status="stopped"),
    sent("half_a_message_then_gone", "half a message, then the end",
         "message(result('0.0'))[:40]", status="stopped"),
    forged("drop_by_drop", "a byte now and then", """
        put(struct.pack("<Q", 1 << 20))
        while True: put(b"x"); time.sleep(0.05)
        """, hangs=True, status="stopped"),
    sent("random_bytes", "random bytes", "os.urandom(100_000)", status="stopped"),
    sent("no_header", "a header that is no JSON",
         "struct.pack('<QQ', 9, 1) + b'\\xff'", status="stopped"),
    sent("deep_json", "lists in lists, a hundred thousand deep",
         "message(result('{\"list\": [' * 100_000 + ']}' * 100_000))", status="stopped"),
    sent("wide_json", "a million objects", "message(result('{\"list\": [%s]}' % "
         "','.join(['{\"other\": \"x\"}'] * 1_000_000)))", status="stopped"),
    sent("less_wide_json", "a hundred thousand objects", "message(result('{\"list\": [%s]}' % "
         "','.join(['{\"other\": \"x\"}'] * 100_000)))"),
    sent("types_of_many_names", "objects of ten thousand types",
         "message(result('{\"list\": [%s]}' % "
         "','.join('{\"other\": \"x%d\"}' % i for i in range(10_000))))"),
    sent("json_nan", "NaN and infinity as JSON has not got them",
         "message(result('{\"list\": [NaN, Infinity, -Infinity]}'))"),
    sent("large_int", "an int of 4000 digits", "message(result('9' * 4000))", status="stopped"),
    sent("unhashable_key", "a dict with a list for a key",
         "message(result('{\"dict\": [[{\"list\": []}, 1]]}'))", status="stopped"),
    sent("many_tensors", "a hundred thousand tensors",
         "message(result('0'), [(str(i), one('F32', [0], 0)['0']) for i in range(100_000)])",
         status="stopped"),
    sent("many_dimensions", "a tensor of ten thousand dimensions",
         "message(result(TENSOR), one('F32', [1] * 10_000, 4), b'aaaa')"),
    sent("shape_beyond_numbers", "a tensor whose size is no number",
         "message(result(TENSOR), one('F32', [0, 1 << 40, 1 << 40], 0))", status="stopped"),
    sent("shape_beyond_its_bytes", "a tensor of 4 TB in 4 bytes",
         "message(result(TENSOR), one('F32', [1 << 40], 4), b'aaaa')", status="stopped"),
    sent("complex", "a complex tensor", "message(result(TENSOR), one('C64', [], 8), b'a' * 8)",
         status="stopped"),
    sent("eighth_of_a_float", "a tensor of 8-bit floats",
         "message(result(TENSOR), one('F8_E4M3', [1], 1), b'a')", status="stopped"),
    sent("unsigned", "a tensor of unsigned 64-bit numbers",
         "message(result(TENSOR), one('U64', [], 8), b'a' * 8)", status="stopped"),
    forged("long_error", "an error whose text has 1.5 MB, and a path for a type", """
        said = json.dumps({"list": ["/usr/lib/secret", "ValueError"]})
        text = '{"dict": [["error", {"dict": [["types", %s], ["text", "%s"], ["where", ""]]}]]}'
        put(message(text % (said, "x" * 1_500_000)))
        time.sleep(1e6)
        """, hangs=True),
    sent("error_of_no_kind", "an error that is no error",
         "message('{\"dict\": [[\"error\", 7]]}')"),
    sent("changed_inputs", "inputs that cannot have changed so",
         "message(result('0').replace('{\"dict\": []}', "
         "'{\"dict\": [[0, \"text\"], [\"none\", 1], [99, 2]]}'))", status="stopped"),
    forged("not_written", "says that it is not written yet", """
        put(message('{"dict": [["error", {"dict": [["types", {"list": ["NotImplementedError"]}],'
                    '["text", ""], ["where", ""]]}]]}'))
        """),
    forged("hanging_up", "closes the channel", "os.closerange(0, 256)", status="stopped"),
    forged("replaced_channel", "puts something else in the channel's place", """
        null = os.open("/dev/zero", os.O_RDONLY)
        for fd in list(channels()): os.dup2(null, fd)
        """, status="stopped"),
    forged("stealing_requests", "reads the referee's requests away", """
        for fd in channels():
            while True: os.read(fd, 1 << 16)
        """, hangs=True, status="stopped"),
    forged("patched_wire", "patches the messages' own code", """
        frame = sys._getframe()
        while frame:
            module = frame.f_globals.get("wire")
            if module:
                module.encode = lambda value: message(result("0.6931471805599453"))[8:]
                module._flatten = lambda value, tensors: True
            frame = frame.f_back
        """),
    forged("traces_in_the_channel", "lets the interpreter write into the channel", """
        for fd in channels(): faulthandler.dump_traceback(file=fd)
        """, status="stopped"),
]  # fmt: skip
