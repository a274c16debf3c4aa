//! Ring arithmetic of NVMe queues (NVMe 1.4 §4.1): head, tail, phase. A ring of `size`
//! entries holds at most `size - 1`.

/// A submission ring as its consumer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubmissionRing {
    size: u32,
    head: u32,
    tail: u32,
}

impl SubmissionRing {
    /// An empty ring of 2 to 65536 entries.
    pub fn new(size: u32) -> Self {
        Self {
            size,
            head: 0,
            tail: 0,
        }
    }
    /// A ring as it was left; `None` if that cannot be.
    pub fn resume(size: u32, head: u32, tail: u32) -> Option<Self> {
        (head < size && tail < size).then_some(Self { size, head, tail })
    }
    /// Takes a tail doorbell; says whether the value is one the ring can have.
    pub fn set_tail(&mut self, tail: u32) -> bool {
        let valid = tail < self.size;
        if valid {
            self.tail = tail;
        }
        valid
    }
    /// The index of the next entry to fetch, if there is one.
    pub fn peek(&self) -> Option<u32> {
        (self.head != self.tail).then_some(self.head)
    }
    /// Moves the head past one fetched entry.
    pub fn advance(&mut self) {
        self.head = (self.head + 1) % self.size;
    }
    /// The head, as completions report it.
    pub fn head(&self) -> u16 {
        self.head as u16
    }
    /// The last tail that was taken.
    pub fn tail(&self) -> u32 {
        self.tail
    }
    /// Number of entries of the ring.
    pub fn size(&self) -> u32 {
        self.size
    }
}

/// A completion ring as its producer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompletionRing {
    size: u32,
    head: u32,
    tail: u32,
    phase: bool,
}

impl CompletionRing {
    /// An empty ring of 2 to 65536 entries, in its first pass (phase 1).
    pub fn new(size: u32) -> Self {
        Self {
            size,
            head: 0,
            tail: 0,
            phase: true,
        }
    }
    /// A ring as it was left, with the number of entries that were ever posted; `None` if that
    /// cannot be.
    pub fn resume(size: u32, head: u32, posted: u64) -> Option<Self> {
        let (passes, tail) = (posted / u64::from(size), posted % u64::from(size));
        (head < size).then_some(Self {
            size,
            head,
            tail: tail as u32,
            phase: passes % 2 == 0,
        })
    }
    fn used(&self) -> u32 {
        (self.tail + self.size - self.head) % self.size
    }
    /// Whether one more entry would make full look like empty.
    pub fn is_full(&self) -> bool {
        self.used() == self.size - 1
    }
    /// Takes a head doorbell; says whether the value is valid: the consumer cannot have
    /// consumed what was not posted.
    pub fn set_head(&mut self, head: u32) -> bool {
        if head >= self.size {
            return false;
        }
        let consumed = (head + self.size - self.head) % self.size;
        let valid = consumed <= self.used();
        if valid {
            self.head = head;
        }
        valid
    }
    /// The last head that was taken.
    pub fn head(&self) -> u32 {
        self.head
    }
    /// Index and phase of the entry to post next. The caller has checked [`Self::is_full`].
    pub fn next(&self) -> (u32, bool) {
        (self.tail, self.phase)
    }
    /// Moves the tail past one posted entry.
    pub fn advance(&mut self) {
        self.tail += 1;
        if self.tail == self.size {
            self.tail = 0;
            self.phase = !self.phase;
        }
    }
    /// Number of entries of the ring.
    pub fn size(&self) -> u32 {
        self.size
    }
}

/// A completion ring as its consumer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompletionCursor {
    size: u32,
    head: u32,
    phase: bool,
}

impl CompletionCursor {
    /// At the start of an empty ring of zeroes.
    pub fn new(size: u32) -> Self {
        Self {
            size,
            head: 0,
            phase: true,
        }
    }
    /// The index to look at, and the phase that an entry there has if it is new.
    pub fn at(&self) -> (u32, bool) {
        (self.head, self.phase)
    }
    /// Moves past one consumed entry.
    pub fn advance(&mut self) {
        self.head += 1;
        if self.head == self.size {
            self.head = 0;
            self.phase = !self.phase;
        }
    }
    /// The value for the head doorbell.
    pub fn head(&self) -> u32 {
        self.head
    }
}
