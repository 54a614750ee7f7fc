"""Eviction policies on Python lists, one frame at a time, as their papers tell them."""


class Oracle:
    def __init__(self, n_frames):
        self.n_frames = n_frames
        self.start()

    def resize(self, n_frames):
        self.n_frames = n_frames


class Lru(Oracle):
    def start(self):
        self.frames = []  # oldest access first

    def insert(self, frame, key):
        self.frames.append(frame)

    def access(self, frame):
        self.frames.remove(frame)
        self.frames.append(frame)

    def remove(self, frame):
        self.frames.remove(frame)

    def victims(self, count, evictable):
        return [frame for frame in self.frames if evictable[frame]][:count]


class Clock(Oracle):
    def start(self):
        self.touched = set()
        self.hand = 0

    def insert(self, frame, key):
        self.touched.discard(frame)

    def access(self, frame):
        self.touched.add(frame)

    def remove(self, frame):
        self.touched.discard(frame)

    def resize(self, n_frames):
        super().resize(n_frames)
        if self.hand >= n_frames:
            self.hand = 0

    def victims(self, count, evictable):
        chosen = []
        for _ in range(2 * self.n_frames):
            if len(chosen) == count:
                break
            frame = self.hand
            self.hand = (self.hand + 1) % self.n_frames
            if not evictable[frame] or frame in chosen:
                continue
            if frame in self.touched:
                self.touched.remove(frame)
            else:
                chosen.append(frame)
        return chosen


class Sieve(Oracle):
    def start(self):
        self.frames = []  # oldest arrival first
        self.visited = set()
        self.hand = None  # a frame; None stands for the oldest

    def insert(self, frame, key):
        self.frames.append(frame)
        self.visited.discard(frame)

    def access(self, frame):
        self.visited.add(frame)

    def newer(self, frame):
        newer = self.frames[self.frames.index(frame) + 1 :]
        return newer[0] if newer else None

    def remove(self, frame):
        if frame == self.hand:
            self.hand = self.newer(frame)
        self.frames.remove(frame)

    def victims(self, count, evictable):
        chosen = []
        for _ in range(2 * len(self.frames)):
            if len(chosen) == count:
                break
            frame = self.frames[0] if self.hand is None else self.hand
            # Past the newest the hand is at the oldest, which arrives no sooner than what is new.
            newer = self.newer(frame)
            self.hand = self.frames[0] if newer is None else newer
            if not evictable[frame] or frame in chosen:
                continue
            if frame in self.visited:
                self.visited.remove(frame)
            else:
                chosen.append(frame)
        return chosen


class S3Fifo(Oracle):
    def start(self):
        self.small, self.main, self.ghost = [], [], []  # oldest first
        self.frequency, self.key = {}, {}
        self.has_evicted = False
        self.small_size = self.small_size_min
        self.n_left, self.left = 0, {}

    @property
    def small_size_min(self):
        return max(1, self.n_frames // 10)

    @property
    def ghost_size(self):
        return max(1, self.n_frames - self.small_size_min)

    def learn(self, n_left_since):
        pass

    def insert(self, frame, key):
        is_warming = not self.has_evicted and len(self.small) >= self.small_size
        if key in self.ghost:
            self.learn(self.n_left - self.left[key])
            self.ghost.remove(key)
            self.main.append(frame)
        elif is_warming:
            self.main.append(frame)
        else:
            self.small.append(frame)
        self.frequency[frame], self.key[frame] = 0, key

    def access(self, frame):
        self.frequency[frame] = min(self.frequency[frame] + 1, 3)

    def remove(self, frame):
        if frame in self.small:
            self.small.remove(frame)
            self.n_left += 1
            self.left[self.key[frame]] = self.n_left
            self.ghost = [*self.ghost, self.key[frame]][-self.ghost_size :]
        else:
            self.main.remove(frame)

    def resize(self, n_frames):
        if n_frames > self.n_frames:
            self.has_evicted = False
        super().resize(n_frames)
        self.ghost = self.ghost[-self.ghost_size :]
        self.small_size = self.small_size_min

    def victims(self, count, evictable):
        if count > 0:
            self.has_evicted = True
        chosen, passed = [], set()
        while len(chosen) < count and passed != {*self.small, *self.main}:
            small_left = [frame for frame in self.small if frame not in chosen]
            is_small_done = passed.issuperset(self.small)
            is_main_done = passed.issuperset(self.main)
            if not is_small_done and (len(small_left) >= self.small_size or is_main_done):
                self.choose_from_small(evictable, chosen, passed)
            else:
                self.choose_from_main(evictable, chosen, passed)
        return chosen

    def choose_from_small(self, evictable, chosen, passed):
        for frame in [frame for frame in self.small if frame not in passed]:
            if self.frequency[frame] > 1:
                self.small.remove(frame)
                self.main.append(frame)
                self.frequency[frame] = 0
            else:
                passed.add(frame)
                if evictable[frame]:
                    chosen.append(frame)
                    return

    def choose_from_main(self, evictable, chosen, passed):
        while left := [frame for frame in self.main if frame not in passed]:
            frame = left[0]
            if evictable[frame] and self.frequency[frame] > 0:
                self.main.remove(frame)
                self.main.append(frame)
                self.frequency[frame] -= 1
            else:
                passed.add(frame)
                if evictable[frame]:
                    chosen.append(frame)
                    return


class Belady(Oracle):
    def start(self):
        self.next_access = {}  # written by the caller
        self.time = {}

    def insert(self, frame, key):
        self.time[frame] = self.next_access[frame]

    def access(self, frame):
        self.time[frame] = self.next_access[frame]

    def remove(self, frame):
        del self.time[frame]

    def victims(self, count, evictable):
        furthest = sorted(self.time, key=lambda frame: (-self.time[frame], frame))
        return [frame for frame in furthest if evictable[frame]][:count]


class S3FifoAdaptive(S3Fifo):
    def learn(self, n_left_since):
        step = max(1, self.n_frames // 64)
        if n_left_since < max(1, self.n_frames // 10):
            self.small_size = min(max(1, self.n_frames // 2), self.small_size + step)
        else:
            self.small_size = max(self.small_size_min, self.small_size - step)
