"""A replica that is counted, not planned: steps between two changes of a batch are one event.

Texts are numbers here, of tokens and of decoding steps that they still take. What differs from
`ScheduledReplica`:

* a text takes as many steps as its trace says from its first token to its last, and gets its tokens
  evenly over them. Where the levels change while it decodes, the mean of each number of levels
  counts;
* pages are counted by tokens, half of one being unused in the mean. What texts get in advance,
  where pages are plenty, they get when they begin to decode: all, or half of what is spare;
* of the beginnings that texts share, those of groups are kept alone. They are forgotten when as
  many pages were given away as were free when their last user ended.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush
from math import ceil, sqrt

from inferlab.scheduler.scheduler import SPARE_PAGES, share_out
from inferlab.simulation.world import NEVER, Replica, World

_EPS = 1e-6


class Work:
    """Decoding steps of texts, in units of which a step makes `gain`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._longest = max(world.output)
        self._of: dict[int, list[float]] = {}
        fixed = world.drafting.fixed
        self.gains = {k: self.gain(k) for k in world.drafting.choices}
        if fixed is not None:
            self.of(fixed)

    def gain(self, levels: int) -> float:
        """Of a step: 1 where all draft alike, else its tokens in the mean."""
        return 1.0 if self._world.drafting.fixed is not None else self._world.drafting.mean(levels)

    def of(self, levels: int) -> list[float]:
        """Of each request, where steps draft so many levels."""
        if levels not in self._of:
            world = self._world
            steps = world.acceptance.steps(levels, self._longest)
            self._of[levels] = (steps[world.trace, world.output] * self.gain(levels)).tolist()
        return self._of[levels]


class _Prefix:
    """What a group's prompts begin with.

    Attributes:
        pages: that hold it, as far as it was read.
        users: running texts that lie on it.
        saved: pages that would be needed more, had each of them its own.
        given, free: pages that had been given away, and were free, when it lost its last user.
    """

    __slots__ = ("free", "given", "pages", "saved", "users")

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.users = 1
        self.saved = 0
        self.given = self.free = 0.0


class LightReplica(Replica):
    """See above."""

    def __init__(self, world: World, work: Work) -> None:
        super().__init__()
        self.world, self.work = world, work
        setting = world.setting
        self._max_batch, self._read_tokens = setting.max_batch, setting.read_tokens
        self._read_beside = min(world.read_beside, setting.read_tokens)
        self._page, self._pages, self._slots = setting.page_size, world.pages, setting.slots
        self._beyond = setting.slots - 1 + (setting.page_size - 1) / 2  # tokens of its last pages
        self._shares = setting.shares
        self.waiting: deque[int] = deque()
        self.reading: list[list[int]] = []  # request, unread, context, pages
        self.decoding: list[tuple[float, int]] = []  # by the work at which it ends
        self._terms: dict[int, tuple[float, float, float, float]] = {}  # to the four sums below
        self._written: dict[int, int] = {}  # of those that lost their pages
        self._done = 0.0  # work
        self._base = self._slope = 0.0  # tokens of all texts that decode: base + slope * work
        self._held = self._grows = 0.0  # the same of the tokens that their pages have room for
        self._reading_pages = 0
        self._saved = 0  # of all prefixes
        self._given = 0.0
        self._known: dict[int, _Prefix] = {}
        self._lies_on: dict[int, _Prefix] = {}
        self._undrafted = 0  # tokens of texts that the drafter has not read
        self._chunks: list[tuple[list[int], int]] = []
        self._begun = 0.0
        self._steps = 1
        self._first_s = self._step_s = self._more_s = self._gain = 0.0
        self._blocked = False
        self._used_at = 0.0

    def add(self, request: int, now: float) -> None:
        self.world.queued[request] = now
        waiting = self.waiting
        waiting.append(request)
        if len(waiting) > self.tally.longest_queue:
            self.tally.longest_queue = len(waiting)
        if self.at == NEVER:
            self._begin(now)
        elif self._steps > 1 and not self._blocked and len(self.decoding) < self._max_batch:
            self._cut(now)

    def fire(self) -> list[int]:
        now, world, tally, steps = self.at, self.world, self.tally, self._steps
        decoding = self.decoding
        spent = now - self._begun
        done: list[int] = []
        tally.busy_s += spent
        tally.steps += steps
        if decoding:
            tally.walks += len(decoding) * steps
            before = self._done
            self._done = after = before + steps * self._gain
            grown = self._grows * (after - before) / self._page
            self._given += grown
            tally.page_s += spent * (self._used_at + grown / 2)
            if self._used_at + grown > tally.most_pages:
                tally.most_pages = self._used_at + grown
            limit = after + _EPS
            while decoding and decoding[0][0] <= limit:
                request = heappop(decoding)[1]
                self._remove(request)
                done.append(request)
        else:
            tally.page_s += spent * self._used_at
        for entry, count in self._chunks:
            entry[1] -= count
            entry[2] += count
            tally.read += count
            if self._shares and world.group[entry[0]] >= 0:
                self._publish(entry[0], entry[2])
        if self._chunks:
            self._chunks = []
            read = [entry for entry in self.reading if entry[1] == 0]
            if read:
                self.reading = [entry for entry in self.reading if entry[1] > 0]
                for entry in read:
                    self._start(entry, now, done)
        if not decoding:
            self._done = self._base = self._slope = self._held = self._grows = 0.0
        for request in done:
            world.ended[request] = now
            tally.tokens += world.output[request]
            if self._lies_on:
                self._leave(request)
        tally.ended += len(done)
        self._begin(now)
        return done

    def _start(self, entry: list[int], now: float, done: list[int]) -> None:
        """A text that was read gets a token, and decodes from now on."""
        request, _, _, pages = entry
        world = self.world
        self._reading_pages -= pages
        written = self._written.pop(request, 0) + 1
        if world.first[request] == NEVER:
            world.first[request] = now
        left = world.output[request] - written
        if left <= 0:
            done.append(request)
            return
        drafting = world.drafting
        tokens = world.prompt[request] + written
        levels = drafting.fixed
        if levels is None:
            batch = len(self.decoding) + 1
            context = (self._base + self._slope * self._done + tokens) / batch
            levels = drafting.levels(batch, context)
        work = self.work.of(levels)[request]
        if written > 1:
            work = max(ceil(left / drafting.mean(levels)), 1) * self.work.gains[levels]
        heappush(self.decoding, (self._done + work, request))
        slope = left / work
        base = tokens - slope * self._done
        held, grows = base + self._beyond, slope
        running = len(self.decoding) + len(self.reading)
        if self._pages - self._used() - pages > 2 * SPARE_PAGES * running:
            ahead = (left + self._slots) // self._page
            if ahead <= SPARE_PAGES:
                held, grows = float(tokens + left + self._slots), 0.0
                self._given += left / self._page
            else:
                held += SPARE_PAGES / 2 * self._page
        self._terms[request] = base, slope, held, grows
        self._base += base
        self._slope += slope
        self._held += held
        self._grows += grows
        self._undrafted += tokens

    def _remove(self, request: int) -> tuple[float, float, float, float]:
        """Of a text that decodes no more."""
        base, slope, held, grows = terms = self._terms.pop(request)
        self._base -= base
        self._slope -= slope
        self._held -= held
        self._grows -= grows
        return terms

    def _used(self) -> float:
        tokens = self._held + self._grows * self._done
        return tokens / self._page + self._reading_pages - self._saved

    def _begin(self, now: float) -> None:
        """Gives pages to those that wait, and plans the steps up to the next change."""
        used = self._used()
        while used > self._pages and len(self.decoding) + len(self.reading) > 1:
            self._preempt(now)
            used = self._used()
        self._blocked = False
        if self.waiting:
            used = self._admit(now, used)
        self._used_at = used
        if used > self.tally.most_pages:
            self.tally.most_pages = used
        batch, prices, steps, ms = len(self.decoding), self.world.prices, 1, 0.0
        if self.reading:
            ms = self._read()
        elif not batch:
            self.at = NEVER
            return
        self._begun = now
        step_ms = more_ms = 0.0
        if batch:
            context = (self._base + self._slope * self._done) / batch
            levels = self.world.drafting.levels(batch, context)
            self._gain = gain = self.work.gains[levels]
            first, slope = prices.line(batch, levels)
            step_ms = first + slope * context
            more_ms = slope * self._slope * gain / batch
            if self._undrafted and levels > 0:
                if prices.drafter_reads:
                    ms += prices.drafter_ms(self._undrafted)
                self._undrafted = 0
            if ms == 0.0:
                steps = max(ceil((self.decoding[0][0] - self._done) / gain - _EPS), 1)
                room = (self._pages - used) * self._page
                grows = self._grows * gain
                if steps * grows > room:
                    steps = max(min(steps, int(room / grows) + 1), 1)
        self._steps = steps
        self._first_s, self._step_s, self._more_s = ms / 1e3, step_ms / 1e3, more_ms / 1e3
        self.at = now + self._first_s + steps * (self._step_s + self._more_s * (steps - 1) / 2)

    def _cut(self, now: float) -> None:
        """Ends what it does now after the step that runs."""
        spent, step, more = now - self._begun, self._step_s, self._more_s
        if more * self._steps < step * 1e-9:
            steps = spent / step
        else:
            half = step - more / 2
            steps = (sqrt(half * half + 2 * more * spent) - half) / more
        count = max(ceil(steps - 1e-9), 1)
        if count < self._steps:
            self._steps = count
            self.at = self._begun + count * (step + more * (count - 1) / 2)

    def _admit(self, now: float, used: float) -> float:
        """As `Scheduler._admit`; returns the pages in use."""
        world, waiting, page = self.world, self.waiting, self._page
        running = len(self.decoding) + len(self.reading)
        while waiting and running < self._max_batch:
            request = waiting[0]
            tokens = world.prompt[request] + self._written.get(request, 0)
            prefix, shared = None, 0
            if self._shares and world.group[request] >= 0:
                prefix = self._find(world.group[request])
                if prefix is not None:
                    common = min(world.shared[request], max(tokens - 2, 0))
                    shared = min(common // page, prefix.pages)
            pages = -(-(tokens - 1 + self._slots) // page)
            idle = shared if prefix is not None and prefix.users == 0 else 0
            missing = pages - shared
            if self._pages - used - idle - missing < running:
                self._blocked = True
                break
            waiting.popleft()
            self.tally.waited_s += now - world.queued[request]
            if prefix is not None and shared > 0:
                self._lies_on[request] = prefix
                if prefix.users > 0:
                    prefix.saved += shared
                    self._saved += shared
                prefix.users += 1
                if world.first[request] == NEVER:
                    self.tally.shared += shared * page
            self._given += missing + idle / 2  # half of which lay before others that are free
            self._reading_pages += pages
            used += missing + idle
            unread = tokens - 1 - shared * page
            self.reading.append([request, unread, shared * page, pages])
            running += 1
        return used

    def _read(self) -> float:
        """Plans what is read, as the scheduler does; returns what it takes."""
        chunks = self._chunks
        sizes = [entry[1] for entry in self.reading]
        running = len(self.reading) + len(self.decoding)
        for place, count in share_out(sizes, running, self._read_tokens, self._read_beside):
            chunks.append((self.reading[place], count))
        tokens, context, ended = 0, 0.0, 0
        for entry, count in chunks:
            tokens += count
            context += entry[2] + count / 2
            ended += count == entry[1]
        return self.world.prices.read_ms(len(chunks), tokens, context / len(chunks), ended)

    def _preempt(self, now: float) -> None:
        """The last that came gives up its pages and waits again, before all others that wait."""
        reads = max(self.reading, default=[-1])
        decodes = max(self.decoding, key=lambda entry: entry[1], default=(0.0, -1))
        world = self.world
        if reads[0] > decodes[1]:
            request = reads[0]
            self.reading.remove(reads)
            self._reading_pages -= reads[3]
        else:
            request = decodes[1]
            self.decoding.remove(decodes)
            heapify(self.decoding)
            base, slope, _, _ = self._remove(request)
            written = int(base + slope * self._done) - world.prompt[request]
            self._written[request] = min(max(written, 1), world.output[request] - 1)
        self._leave(request)
        world.queued[request] = now
        self.waiting.appendleft(request)
        self.tally.preempted += 1

    def _find(self, group: int) -> _Prefix | None:
        prefix = self._known.get(group)
        if prefix is not None and prefix.users == 0 and self._given - prefix.given > prefix.free:
            del self._known[group]
            return None
        return prefix

    def _publish(self, request: int, read: int) -> None:
        """What a text begins with is there for others of its group, as far as it was read."""
        group = self.world.group[request]
        pages = min(read, self.world.shared[request]) // self._page
        prefix = self._find(group)
        if prefix is not None:
            if pages > prefix.pages and self._lies_on.get(request) is prefix:
                prefix.pages = pages
        elif pages > 0 and request not in self._lies_on:
            self._known[group] = self._lies_on[request] = _Prefix(pages)

    def _leave(self, request: int) -> None:
        prefix = self._lies_on.pop(request, None)
        if prefix is None:
            return
        prefix.users -= 1
        saved = min(prefix.saved, prefix.pages) if prefix.users else prefix.saved
        prefix.saved -= saved
        self._saved -= saved
        if prefix.users == 0:
            prefix.given, prefix.free = self._given, self._pages - self._used()
