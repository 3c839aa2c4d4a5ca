//! A bounded queue from many threads to one, made for bursts: it holds no memory while it is empty, and it wakes its
//! reader once for all that comes within a few milliseconds.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a reader that was woken lets more come before it looks again.
///
/// A wakeup costs the sender some 5 µs, as much as all else that it does to report a flow; metrics and log lines may
/// be this old.
pub(super) const GATHER: Duration = Duration::from_millis(5);
/// Room for this many items is kept for the next burst.
const KEPT: usize = 64;

/// Where items are put. The reader ends when the last one is gone.
#[derive(Debug)]
pub(super) struct Mailbox<T> {
    shared: Arc<Shared<T>>,
}

/// Where items are taken out.
#[derive(Debug)]
pub(super) struct Letters<T> {
    shared: Arc<Shared<T>>,
}

#[derive(Debug)]
struct Shared<T> {
    queue: Mutex<Queue<T>>,
    came: Condvar,
    bound: usize,
}

#[derive(Debug)]
struct Queue<T> {
    items: VecDeque<T>,
    /// The reader sleeps until it is woken.
    asleep: bool,
    closed: bool,
}

/// The queue was full; the item is lost.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Full;

/// A queue of at most `bound` items.
pub(super) fn mailbox<T>(bound: usize) -> (Mailbox<T>, Letters<T>) {
    let queue = Queue { items: VecDeque::new(), asleep: false, closed: false };
    let shared = Arc::new(Shared { queue: Mutex::new(queue), came: Condvar::new(), bound });
    (Mailbox { shared: Arc::clone(&shared) }, Letters { shared })
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        // Pushing and taking leave the queue whole, whatever panicked.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Mailbox<T> {
    /// Adds an item. Waits for nothing but the lock, under which only pushing and taking happen.
    pub(super) fn put(&self, item: T) -> Result<(), Full> {
        let queue = self.shared.lock();
        if queue.items.len() >= self.shared.bound {
            return Err(Full);
        }
        self.push(queue, item);
        Ok(())
    }

    /// Adds an item though the queue be full: for what has a bound of its own.
    pub(super) fn put_beyond(&self, item: T) {
        self.push(self.shared.lock(), item);
    }

    fn push(&self, mut queue: MutexGuard<'_, Queue<T>>, item: T) {
        queue.items.push_back(item);
        let wake = std::mem::take(&mut queue.asleep);
        drop(queue);
        if wake {
            self.shared.came.notify_one();
        }
    }
}

impl<T> Drop for Mailbox<T> {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.came.notify_one();
    }
}

impl<T> Letters<T> {
    /// Everything that has come, in order; sleeps until something has or `until` has come. None once the mailbox is
    /// gone and empty.
    pub(super) fn take(&self, until: Option<Instant>) -> Option<VecDeque<T>> {
        let mut queue = self.shared.lock();
        while queue.items.is_empty() {
            if queue.closed {
                return None;
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                break;
            }
            queue.asleep = true;
            queue = match left {
                None => self.shared.came.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    let waited = self.shared.came.wait_timeout(queue, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        queue.asleep = false;
        Some(std::mem::replace(&mut queue.items, VecDeque::with_capacity(KEPT)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_come_in_order_and_the_rest_after_the_end() {
        let (mailbox, letters) = mailbox(8);
        for item in 0..3 {
            mailbox.put(item).unwrap();
        }
        assert_eq!(letters.take(None), Some(VecDeque::from([0, 1, 2])));
        mailbox.put(3).unwrap();
        drop(mailbox);
        assert_eq!(letters.take(None), Some(VecDeque::from([3])));
        assert_eq!(letters.take(None), None);
    }

    #[test]
    fn a_full_mailbox_refuses() {
        let (mailbox, letters) = mailbox(2);
        assert_eq!((mailbox.put(1), mailbox.put(2), mailbox.put(3)), (Ok(()), Ok(()), Err(Full)));
        assert_eq!(letters.take(None).map(|items| items.len()), Some(2));
        assert_eq!(mailbox.put(3), Ok(()));
    }

    #[test]
    fn what_has_a_bound_of_its_own_is_taken_beyond_the_bound() {
        let (mailbox, letters) = mailbox(1);
        assert_eq!((mailbox.put(1), mailbox.put(2)), (Ok(()), Err(Full)));
        mailbox.put_beyond(3);
        assert_eq!(letters.take(None), Some(VecDeque::from([1, 3])));
    }

    #[test]
    fn a_burst_leaves_no_memory_behind() {
        let (mailbox, letters) = mailbox(100_000);
        for item in 0..100_000 {
            mailbox.put(item).unwrap();
        }
        drop(letters.take(None));
        assert!(letters.shared.lock().items.capacity() <= 2 * KEPT);
    }

    #[test]
    fn a_reader_that_waits_until_a_time_gets_nothing_then() {
        let (mailbox, letters) = mailbox::<u8>(8);
        let soon = Instant::now() + Duration::from_millis(1);
        assert_eq!(letters.take(Some(soon)), Some(VecDeque::new()));
        drop(mailbox);
        assert_eq!(letters.take(Some(soon)), None);
    }

    #[test]
    fn a_sleeping_reader_is_woken() {
        let (mailbox, letters) = mailbox(8);
        let reader = std::thread::spawn(move || {
            let mut sum = 0;
            while let Some(items) = letters.take(None) {
                sum += items.into_iter().sum::<u64>();
            }
            sum
        });
        for item in 1..=1000 {
            while mailbox.put(item).is_err() {
                std::thread::yield_now();
            }
        }
        drop(mailbox);
        assert_eq!(reader.join().unwrap(), 500_500);
    }
}
