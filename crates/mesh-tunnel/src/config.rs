//! The engine's settings.

use std::time::Duration;

/// Settings of one engine. [`EngineConfig::default`] is right for production; tests shrink limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// What a peer may send on one stream before the application took it. Bytes, 65,535..=2^31-1; default 4 MiB.
    pub stream_window: u32,
    /// What a peer may send on all streams of a tunnel together before the engine has read it. Bytes, 65,535..=2^31-1;
    /// default 16 MiB.
    pub connection_window: u32,
    /// Longest frame accepted. Bytes, 16,384..=2^24-1; default 1 MiB. Source: wire.md §1.7.
    pub max_frame_size: u32,
    /// Requests a peer may have open at once on one tunnel; default 200.
    pub max_concurrent_streams: u32,
    /// Streams put on one dialled tunnel, unless the peer allows fewer; default 100.
    pub streams_per_tunnel: u32,
    /// Longest header list of a request, as RFC 9113 §6.5.2 counts it. Bytes; default 64 KiB.
    pub request_header_limit: u32,
    /// Longest header list of a response. Bytes; default 16 KiB.
    pub response_header_limit: u32,
    /// What one stream may move before the next has its turn. Bytes; default 128 KiB.
    pub quantum: usize,
    /// Sealed bytes a tunnel may hold before it stops taking from applications. Bytes, >= 32 KiB; default 512 KiB.
    pub send_buffer: usize,
    /// Bytes asked for in one read of a tunnel. >= 1; default 256 KiB.
    pub receive_buffer: usize,
    /// Bytes sent on a stream before the peer's 200, and kept to be sent again should the peer not have processed them.
    /// 0 waits for the 200; default 48 KiB.
    pub early_data: usize,
    /// Records sealed with one key before it is renewed. Default 2^23, half of what rustls allows for AES-GCM.
    pub key_update_after: u64,
    /// Silence of the peer after which it is asked for a sign of life; default 10 s.
    pub ping_interval: Duration,
    /// How long a PING may stay unanswered; default 20 s.
    pub ping_timeout: Duration,
    /// How long the peer's preface, SETTINGS and acknowledgement may take; default 10 s.
    pub settings_timeout: Duration,
    /// How long a dialled tunnel without streams is kept, counted from the last stream's end; default 5 min.
    pub idle_timeout: Duration,
    /// How long opens wait for a dial; default 20 s.
    pub dial_timeout: Duration,
    /// How long an application socket may take to connect; default 10 s.
    pub connect_timeout: Duration,
    /// How long a peer may take to answer a CONNECT: its own connect timeout and the way there and back; default 20 s.
    pub answer_timeout: Duration,
    /// How long the streams of a retired tunnel may go on; `None` (default) leaves them until they end.
    pub drain_timeout: Option<Duration>,
    /// How long a closed tunnel's socket may wait for the peer to take the last bytes; default 2 s.
    pub linger_timeout: Duration,
    /// Relays of this engine at once, requests included; more are refused as overloaded. Default 262,144.
    pub max_relays: usize,
    /// Tunnels of this engine at once; more are refused as overloaded. Default 65,536.
    pub max_tunnels: usize,
    /// Tunnels dialled for one key at once; what they have no room for is refused as overloaded. Default 1,024.
    pub max_tunnels_per_key: usize,
    /// Opens that may wait for one key's dial; more are refused as overloaded. Default 8,192.
    pub max_waiting: usize,
    /// Bytes held for applications that do not read, over all streams. From a half of it on they count against the windows of
    /// their tunnels as well as of their streams; at the limit a stream that would add to a backlog of its own is reset as
    /// overloaded. Default 512 MiB.
    pub queue_budget: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            max_frame_size: 1 << 20,
            max_concurrent_streams: 200,
            streams_per_tunnel: 100,
            request_header_limit: 64 << 10,
            response_header_limit: 16 << 10,
            quantum: 128 << 10,
            send_buffer: 512 << 10,
            receive_buffer: 256 << 10,
            early_data: 48 << 10,
            key_update_after: 1 << 23,
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            settings_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(300),
            dial_timeout: Duration::from_secs(20),
            connect_timeout: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(20),
            drain_timeout: None,
            linger_timeout: Duration::from_secs(2),
            max_relays: 262_144,
            max_tunnels: 65_536,
            max_tunnels_per_key: 1_024,
            max_waiting: 8_192,
            queue_budget: 512 << 20,
        }
    }
}
