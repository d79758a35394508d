"""Plays Firecracker's side of a snapshot load with mem_backend Uffd, as docs/snapshotting/handling-page-faults-on-snapshot-resume.md
of Firecracker describes it: anonymous private memory, a userfaultfd that wants removals told, one message with all regions.

usage: player.py SOCKET SPEC    (SPEC is JSON; commands come one a line on stdin, each is answered with one line of JSON)
"""

import array, ctypes, errno, json, os, random, select, socket, struct, sys, threading, time, zlib

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libc.write.restype = ctypes.c_ssize_t
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]

MADV_DONTNEED = 4
MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MAP_HUGETLB = 0x02, 0x20, 0x4000, 0x40000
USERFAULTFD_IOC_NEW, UFFDIO_API, UFFDIO_REGISTER = 0xAA00, 0xC018AA3F, 0xC020AA00
EVENT_REMOVE, MISSING_HUGETLBFS = 1 << 3, 1 << 4


def check(result, what):
    if result in (-1, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, what + ": " + os.strerror(number))
    return result


class Memory:
    """Regions as (size, offset in the file), mapped in the order in which they are given."""

    def __init__(self, regions, page):
        self.page, self.regions = page, []
        huge = page > 4096
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (MAP_HUGETLB if huge else 0)
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        self.uffd = check(libc.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK), "userfaultfd")
        os.close(device)
        api = ctypes.create_string_buffer(struct.pack("<QQQ", 0xAA, EVENT_REMOVE | (MISSING_HUGETLBFS if huge else 0), 0))
        check(libc.ioctl(self.uffd, UFFDIO_API, api), "UFFDIO_API")
        for size, offset in regions:
            at = check(libc.mmap(None, size, 3, flags, -1, 0), "mmap")
            register = ctypes.create_string_buffer(struct.pack("<QQQQ", at, size, 1, 0))
            check(libc.ioctl(self.uffd, UFFDIO_REGISTER, register), "UFFDIO_REGISTER")
            self.regions.append((at, size, offset))
        self.size = sum(size for size, _ in regions)

    def at(self, offset):
        for at, size, start in self.regions:
            if start <= offset < start + size:
                return at + offset - start
        raise ValueError("no memory at %d" % offset)

    def described(self, fields):
        names = {"both": ("page_size", "page_size_kib"), "kib": ("page_size_kib",), "none": ()}[fields]
        return [
            {"base_host_virt_addr": at, "size": size, "offset": offset, **{name: self.page for name in names}}
            for at, size, offset in self.regions
        ]

    def read(self, start, length, threads):
        """Touches all pages of a range, in no order, and returns its CRC32."""
        found = ctypes.create_string_buffer(length)
        base, pages = ctypes.addressof(found), list(range(0, length, 4096))
        random.Random(start + threads).shuffle(pages)

        def run(own):
            for page in own:
                # A call of C: others of this process run while it waits.
                libc.memcpy(base + page, self.at(start + page), min(4096, length - page))

        running = [threading.Thread(target=run, args=(pages[n::threads],)) for n in range(threads)]
        [thread.start() for thread in running]
        [thread.join() for thread in running]
        return zlib.crc32(found.raw[:length])

    def errors(self, offsets):
        """Has the kernel touch pages, and returns the numbers of the errors: 0, or EFAULT for what would be a SIGBUS."""
        reading, writing = os.pipe()
        numbers = []
        for offset in offsets:
            done = libc.write(writing, self.at(offset), 1)
            numbers.append(0 if done == 1 else ctypes.get_errno())
            if done == 1:
                os.read(reading, 1)
        os.close(reading), os.close(writing)
        return numbers


def connect(path):
    link = socket.socket(socket.AF_UNIX)
    for _ in range(500):
        try:
            link.connect(path)
            return link
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.01)
    raise OSError("nobody listens")


def say(link, text, descriptors, pieces):
    beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    first = 1 if pieces else len(text)
    link.sendmsg([text[:first]], beside)
    for n in range(first, len(text), 7):
        time.sleep(0.001)
        link.send(text[n : n + 7])


def serve(memory, link, command, words):
    numbers = [int(word) for word in words]
    if command == "read":
        return memory.read(*numbers)
    if command == "errors":
        return memory.errors(numbers)
    if command == "errno":
        return errno.EFAULT
    if command == "remove":
        check(libc.madvise(memory.at(numbers[0]), numbers[1], MADV_DONTNEED), "madvise")
        return True
    if command == "write":
        ctypes.memset(memory.at(numbers[0]), numbers[1], 1)
        return True
    if command == "churn":
        # Takes memory away and reads it, again and again, in several threads: each has a part for itself.
        start, length, times, threads = numbers
        wrong = []

        def run(n):
            step = length // threads // memory.page * memory.page
            own, source = start + n * step, random.Random(n)
            buffer = ctypes.create_string_buffer(1)
            for _ in range(times):
                at = own + source.randrange(step // memory.page) * memory.page
                check(libc.madvise(memory.at(at), memory.page, MADV_DONTNEED), "madvise")
                libc.memcpy(ctypes.addressof(buffer), memory.at(at + source.randrange(memory.page)), 1)
                if buffer.raw[0] != 0:
                    wrong.append(at)

        running = [threading.Thread(target=run, args=(n,)) for n in range(threads)]
        [thread.start() for thread in running]
        [thread.join() for thread in running]
        return wrong
    if command == "closed":
        poll = select.poll()
        poll.register(link, select.POLLIN)
        try:
            return bool(poll.poll(numbers[0])) and link.recv(1) == b""
        except ConnectionResetError:
            # It had not read all that was said.
            return True
    if command == "peer":
        return struct.unpack("iII", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    raise ValueError(command)


def main():
    path, spec = sys.argv[1], json.loads(sys.argv[2])
    memory = Memory(spec["regions"], spec.get("page", 4096))
    if spec.get("look_first"):
        connect(path).close()
    link = connect(path)
    extra = [os.open("/dev/null", os.O_RDONLY) for _ in range(spec.get("extra", 0))]
    descriptors = [os.open("/dev/null", os.O_RDONLY) if spec.get("fake") else memory.uffd] + extra
    # Who touches memory before the handshake waits until it is served.
    early = {}

    def begin(line):
        command, *words = line.split()
        early[line] = serve(memory, link, command, words)

    waiting = [threading.Thread(target=begin, args=(line,)) for line in spec.get("early", [])]
    [thread.start() for thread in waiting]
    time.sleep(0.1 if waiting else 0)
    text = spec.get("text", json.dumps(memory.described(spec.get("fields", "both")))).encode()
    say(link, text, [] if spec.get("bare") else descriptors, spec.get("pieces", False))
    if spec.get("hang_up"):
        link.shutdown(socket.SHUT_RDWR)
        link.close()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command, *words = line.split()
        if command == "exit":
            break
        if command == "early":
            [thread.join() for thread in waiting]
            print(json.dumps([early[line] for line in spec["early"]]), flush=True)
            continue
        print(json.dumps(serve(memory, link, command, words)), flush=True)


main()
