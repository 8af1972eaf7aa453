//! What the programs count: one number per outcome, and every refusal has one.
//!
//! The same list feeds the metric `picomesh_kernel_refusals_total{reason}`, the words of
//! `picomesh-agent debug pods` and the table in ARCHITECTURE.md. A retired number stays, as
//! `Unused…`.

/// Index into a pod's row of the per-CPU array `COUNTERS` (row length [`Counter::COUNT`]).
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Counter {
    /// A connection of the pod was taken to the outbound listener.
    CapturedOutbound = 0,
    /// A connection to the pod was taken to the inbound listener.
    CapturedInbound = 1,
    /// A SYN of a probe of the host passed.
    ProbePassed = 2,
    /// A SYN to a port nobody listens on passed, so that the kernel refuses it.
    RefusedByKernel = 3,
    /// A packet went past because the user chose fail-open and there was no listener.
    FailedOpen = 4,

    /// Neither IPv4, IPv6 nor ARP (VLAN tags end here).
    UnknownEthertype = 8,
    /// The IP header, its options or extension headers do not parse.
    BadHeader = 9,
    /// A fragment of a TCP packet.
    Fragment = 10,
    /// Too many IPv6 extension headers.
    TooManyExtensions = 11,
    /// Came from outside and carried the capture mark.
    ForeignMark = 12,
    /// No outbound listener stands.
    NoOutboundListener = 13,
    /// No inbound listener stands.
    NoInboundListener = 14,
    /// A packet of a connection we took, with our socket gone and no listener to answer RST.
    OrphanedTaken = 15,
    /// From outside, to an application's socket that neither stood before nor is a probe.
    NotStanding = 16,
    /// Of a socket of the pod that we neither took nor know as standing.
    UnknownSender = 17,
    /// `sk_lookup` found no listener.
    SteeredNowhere = 18,
    /// The slot is not active.
    Inactive = 19,
    /// A redirect could not be prepared (packet too short to rewrite).
    RedirectFailed = 20,
    /// The shared program that decides is not in its place.
    NoProgram = 21,
}

impl Counter {
    /// Length of a pod's row.
    pub const COUNT: u32 = 32;
    /// From here on an outcome is a refusal.
    pub const FIRST_REFUSAL: u32 = 8;

    pub const ALL: [Self; 19] = [
        Self::CapturedOutbound,
        Self::CapturedInbound,
        Self::ProbePassed,
        Self::RefusedByKernel,
        Self::FailedOpen,
        Self::UnknownEthertype,
        Self::BadHeader,
        Self::Fragment,
        Self::TooManyExtensions,
        Self::ForeignMark,
        Self::NoOutboundListener,
        Self::NoInboundListener,
        Self::OrphanedTaken,
        Self::NotStanding,
        Self::UnknownSender,
        Self::SteeredNowhere,
        Self::Inactive,
        Self::RedirectFailed,
        Self::NoProgram,
    ];

    pub const fn is_refusal(self) -> bool {
        self as u32 >= Self::FIRST_REFUSAL
    }

    /// The word in metrics, logs and the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::CapturedOutbound => "captured_outbound",
            Self::CapturedInbound => "captured_inbound",
            Self::ProbePassed => "probe_passed",
            Self::RefusedByKernel => "refused_by_kernel",
            Self::FailedOpen => "failed_open",
            Self::UnknownEthertype => "unknown_ethertype",
            Self::BadHeader => "bad_header",
            Self::Fragment => "fragment",
            Self::TooManyExtensions => "too_many_extensions",
            Self::ForeignMark => "foreign_mark",
            Self::NoOutboundListener => "no_outbound_listener",
            Self::NoInboundListener => "no_inbound_listener",
            Self::OrphanedTaken => "orphaned_taken",
            Self::NotStanding => "not_standing",
            Self::UnknownSender => "unknown_sender",
            Self::SteeredNowhere => "steered_nowhere",
            Self::Inactive => "inactive",
            Self::RedirectFailed => "redirect_failed",
            Self::NoProgram => "no_program",
        }
    }
}

const _: () = {
    let mut i = 0;
    while i < Counter::ALL.len() {
        assert!((Counter::ALL[i] as u32) < Counter::COUNT);
        i += 1;
    }
};
