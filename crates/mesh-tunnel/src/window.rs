//! Flow control in both directions. Source: RFC 9113 §5.2, §6.9.

use crate::frame::MAX_WINDOW;
use crate::handover::{HandOverError, WindowState, check};

/// What we may send: on a stream or on the whole connection. Can be negative after the peer shrank its initial window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SendWindow(i64);

/// The peer's credit would exceed 2^31-1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WindowOverflow;

impl SendWindow {
    pub(crate) const fn new(initial: u32) -> Self {
        Self(initial as i64)
    }

    pub(crate) const fn state(self) -> i64 {
        self.0
    }

    pub(crate) fn from_state(state: i64) -> Result<Self, HandOverError> {
        let range = -i64::from(MAX_WINDOW)..=i64::from(MAX_WINDOW);
        check(range.contains(&state), "a send window")?;
        Ok(Self(state))
    }

    /// What may be sent now, bytes.
    pub(crate) fn available(self) -> usize {
        usize::try_from(self.0).unwrap_or(0)
    }

    pub(crate) const fn take(&mut self, sent: usize) {
        self.0 -= sent as i64;
    }

    /// A WINDOW_UPDATE's credit, or the difference that a changed initial window makes.
    pub(crate) const fn add(&mut self, change: i64) -> Result<(), WindowOverflow> {
        let sum = self.0 + change;
        if sum > MAX_WINDOW as i64 {
            return Err(WindowOverflow);
        }
        self.0 = sum;
        Ok(())
    }
}

/// What the peer may send, and what we owe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReceiveWindow {
    size: u32,
    /// What the peer may still send.
    left: u32,
    /// Taken by the application, not yet given back.
    credit: u32,
}

/// The peer sent more than it was allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WindowExceeded;

impl ReceiveWindow {
    pub(crate) const fn new(size: u32) -> Self {
        Self { size, left: size, credit: 0 }
    }

    pub(crate) const fn state(self) -> WindowState {
        WindowState { size: self.size, left: self.left, credit: self.credit }
    }

    pub(crate) fn from_state(state: WindowState) -> Result<Self, HandOverError> {
        let WindowState { size, left, credit } = state;
        check(size <= MAX_WINDOW && left <= size && credit <= size - left, "a receive window")?;
        Ok(Self { size, left, credit })
    }

    /// A DATA frame of this length has begun.
    pub(crate) fn receive(&mut self, length: u32) -> Result<(), WindowExceeded> {
        self.left = self.left.checked_sub(length).ok_or(WindowExceeded)?;
        Ok(())
    }

    /// The application took bytes. Returns the credit to send, once it is worth a frame: a quarter of the window.
    pub(crate) fn release(&mut self, length: usize) -> Option<u32> {
        let room = self.size - self.left;
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        self.credit = self.credit.saturating_add(length).min(room);
        if self.credit < self.size / 4 {
            return None;
        }
        let credit = std::mem::take(&mut self.credit);
        self.left += credit;
        Some(credit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credit_is_bounded_by_the_window() {
        let mut window = ReceiveWindow::new(100);
        assert_eq!(window.receive(60), Ok(()));
        assert_eq!(window.receive(41), Err(WindowExceeded));
        assert_eq!(window.release(10), None);
        assert_eq!(window.release(20), Some(30));
        assert_eq!(window.receive(70), Ok(()));
        assert_eq!(window.release(1000), Some(100));
    }

    #[test]
    fn a_send_window_may_go_negative_but_not_over() {
        let mut window = SendWindow::new(10);
        window.take(10);
        assert_eq!(window.add(-5), Ok(()));
        assert_eq!(window.available(), 0);
        assert_eq!(window.add(i64::from(MAX_WINDOW) + 5), Ok(()));
        assert_eq!(window.add(1), Err(WindowOverflow));
    }
}
