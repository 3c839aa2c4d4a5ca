//! Both ends of the end-to-end suite's own protocols: what nginx, redis and psql cannot ask of a connection.
//!
//! `serve` listens on every port of [`ports`]; each client verb checks one behaviour from the other side and
//! fails with the reason when it does not find it.

pub mod bulk;
pub mod grpc;
pub mod idle;
pub mod live;
pub mod shape;
pub mod websocket;

/// One port per behaviour, all served by `culvert-lab-peer serve`.
pub mod ports {
    /// Position-dependent bytes both ways.
    pub const BULK: u16 = 7001;
    /// Echoes until the client half-closes, then says how much it saw.
    pub const ECHO: u16 = 7002;
    /// Speaks first.
    pub const SERVER_FIRST: u16 = 7003;
    /// Resets after the first byte.
    pub const RESET: u16 = 7004;
    /// Accepts and keeps quiet.
    pub const IDLE: u16 = 7005;
    /// gRPC.
    pub const GRPC: u16 = 7006;
    /// WebSocket.
    pub const WEBSOCKET: u16 = 7007;
    /// Tells the client which addresses the server sees.
    pub const WHO: u16 = 7008;
    /// Waits for the client's reset; how it ended is asked at [`ENDINGS`].
    pub const WATCH: u16 = 7009;
    /// Tells how the last connection at [`WATCH`] or [`SERVER_HALF_CLOSE`] ended.
    pub const ENDINGS: u16 = 7010;
    /// Half-closes first, then reads what the client still sends; how much is asked at [`ENDINGS`].
    pub const SERVER_HALF_CLOSE: u16 = 7011;
}
