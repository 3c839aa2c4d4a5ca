//! A writer that never waits: whole lines go through a bounded queue to a thread that does the writing.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

/// Longest line, bytes; a longer one is cut.
pub const MAX_LINE_BYTES: usize = 16 * 1024;

/// How long the end of the process waits for queued lines.
const FLUSH_PATIENCE: Duration = Duration::from_secs(1);

enum Item {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

/// Puts lines into the queue; cheap to clone. When the queue is full the line is dropped and counted.
#[derive(Clone, Debug)]
pub struct LineWriter {
    queue: SyncSender<Item>,
    dropped: Arc<AtomicU64>,
}

/// Waits for queued lines when it is dropped, `FLUSH_PATIENCE` at most.
#[derive(Debug)]
pub struct FlushOnDrop {
    queue: SyncSender<Item>,
}

impl LineWriter {
    /// Starts the thread that writes to `sink`. It ends when the last writer is dropped.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(
        sink: impl io::Write + Send + 'static,
        queue_lines: usize,
    ) -> io::Result<(Self, FlushOnDrop)> {
        let (queue, lines) = sync_channel(queue_lines.max(1));
        let dropped = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&dropped);
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_lines(sink, &lines, &counter))?;
        Ok((Self { queue: queue.clone(), dropped }, FlushOnDrop { queue }))
    }

    /// Queues `line`, which ends with a newline.
    pub fn line(&self, line: impl Into<Vec<u8>>) {
        let mut line = line.into();
        if line.len() > MAX_LINE_BYTES {
            line.truncate(MAX_LINE_BYTES - 1);
            line.push(b'\n');
        }
        match self.queue.try_send(Item::Line(line)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Lines dropped so far.
    #[must_use]
    pub fn dropped_lines(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// `tracing_subscriber` hands over each event as one write.
impl io::Write for LineWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.line(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LineWriter {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

impl Drop for FlushOnDrop {
    fn drop(&mut self) {
        let (done, flushed) = sync_channel(1);
        // A full queue means a stalled sink; there is nothing to wait for then.
        if self.queue.try_send(Item::Flush(done)).is_ok()
            && flushed.recv_timeout(FLUSH_PATIENCE) == Err(RecvTimeoutError::Timeout)
        {
            tracing::debug!("the log's sink is stalled, lines are lost");
        }
    }
}

/// Lines written by one call when many wait: a burst of connections makes a line each.
const LINES_PER_WRITE: usize = 64;
/// Memory kept for the next write.
const KEPT_BYTES: usize = 16 * 1024;

fn write_lines(mut sink: impl io::Write, queue: &Receiver<Item>, dropped: &AtomicU64) {
    let mut text = Vec::new();
    while let Ok(first) = queue.recv() {
        let mut lines = 0;
        let mut flush = None;
        for item in std::iter::once(first).chain(queue.try_iter()) {
            match item {
                Item::Line(line) => {
                    text.extend_from_slice(&line);
                    lines += 1;
                }
                Item::Flush(done) => flush = Some(done),
            }
            if lines == LINES_PER_WRITE || flush.is_some() {
                break;
            }
        }
        // A sink that fails loses the lines like one that stalls.
        if sink.write_all(&text).is_err() {
            dropped.fetch_add(lines as u64, Ordering::Relaxed);
        }
        text.clear();
        text.shrink_to(KEPT_BYTES);
        if let Some(done) = flush {
            let flushed = sink.flush();
            if flushed.is_err() || done.send(()).is_err() {
                dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Instant;

    use super::*;

    /// A sink that lets nothing through until it is told to.
    struct Stalled {
        gate: Arc<Mutex<()>>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl io::Write for Stalled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _open = self.gate.lock().unwrap();
            // One byte at a time: partial writes must not mix lines.
            self.written.lock().unwrap().extend_from_slice(&bytes[..1]);
            Ok(1)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stalled_sink_costs_lines_and_no_time() {
        let gate = Arc::new(Mutex::new(()));
        let written = Arc::new(Mutex::new(Vec::new()));
        let sink = Stalled { gate: Arc::clone(&gate), written: Arc::clone(&written) };
        let closed = gate.lock().unwrap();
        let (writer, flush) = LineWriter::start(sink, 4).unwrap();
        let begun = Instant::now();
        let writers: Vec<_> = (0..4)
            .map(|_| {
                let writer = writer.clone();
                thread::spawn(move || (0..1000).for_each(|_| writer.line("whole line\n")))
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert!(begun.elapsed() < Duration::from_secs(1), "writing waited for the sink");
        let dropped = writer.dropped_lines();
        // The queue holds four, the thread what it was about to write.
        let held = 4 + LINES_PER_WRITE as u64;
        assert!(dropped >= 4000 - held, "only {dropped} lines dropped");
        drop(closed);
        // The queue may still be full when the gate opens; its lines come first.
        let (done, flushed) = sync_channel(1);
        writer.queue.send(Item::Flush(done)).unwrap();
        flushed.recv().unwrap();
        let text = String::from_utf8(written.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count() as u64, 4000 - dropped);
        assert!(text.lines().all(|line| line == "whole line"));
        drop(flush);
    }

    #[test]
    fn a_line_that_is_too_long_is_cut() {
        let gate = Arc::new(Mutex::new(()));
        let written = Arc::new(Mutex::new(Vec::new()));
        let sink = Stalled { gate, written: Arc::clone(&written) };
        let (writer, flush) = LineWriter::start(sink, 4).unwrap();
        writer.line(vec![b'x'; MAX_LINE_BYTES * 2]);
        drop(flush);
        let written = written.lock().unwrap();
        assert_eq!((written.len(), written.last()), (MAX_LINE_BYTES, Some(&b'\n')));
    }
}
