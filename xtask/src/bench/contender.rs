//! Who is compared with whom.

use clap::ValueEnum;

/// In the order in which a round goes through them: each picomesh next to its control.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Contender {
    /// Two nodes, nothing in between.
    None,
    /// Two nodes, an agent on each.
    Picomesh,
    /// Two nodes, haproxy in TCP mode on each, mutual TLS between them.
    Haproxy,
    /// Two nodes, nginx's stream module on each, mutual TLS between them.
    Nginx,
    /// Client and server on one node, nothing in between.
    NoneOneNode,
    /// Client and server on one node, its agent in between, not accelerated.
    PicomeshOneNode,
}

impl Contender {
    pub(crate) const ALL: [Self; 6] = [
        Self::None,
        Self::Picomesh,
        Self::Haproxy,
        Self::Nginx,
        Self::NoneOneNode,
        Self::PicomeshOneNode,
    ];

    /// As `--only` and the JSON call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Picomesh => "picomesh",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
            Self::NoneOneNode => "none-one-node",
            Self::PicomeshOneNode => "picomesh-one-node",
        }
    }

    /// As a column's head.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::None | Self::NoneOneNode => "no mesh",
            Self::Picomesh | Self::PicomeshOneNode => "picomesh",
            Self::Haproxy => "haproxy TCP + mTLS",
            Self::Nginx => "nginx TCP + mTLS",
        }
    }

    pub(crate) fn nodes(self) -> usize {
        match self {
            Self::None | Self::Picomesh | Self::Haproxy | Self::Nginx => 2,
            Self::NoneOneNode | Self::PicomeshOneNode => 1,
        }
    }

    /// Anything between client and server whose CPU and memory count?
    pub(crate) fn has_proxies(self) -> bool {
        match self {
            Self::None | Self::NoneOneNode => false,
            Self::Picomesh | Self::Haproxy | Self::Nginx | Self::PicomeshOneNode => true,
        }
    }

    pub(crate) fn is_picomesh(self) -> bool {
        match self {
            Self::Picomesh | Self::PicomeshOneNode => true,
            Self::None | Self::Haproxy | Self::Nginx | Self::NoneOneNode => false,
        }
    }

    /// The same way without a mesh.
    pub(crate) fn control(self) -> Self {
        match self {
            Self::None | Self::Picomesh | Self::Haproxy | Self::Nginx => Self::None,
            Self::NoneOneNode | Self::PicomeshOneNode => Self::NoneOneNode,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_the_command_line_are_those_of_the_report() {
        for contender in Contender::ALL {
            let value = contender.to_possible_value();
            assert_eq!(value.as_ref().map(|v| v.get_name()), Some(contender.name()));
        }
    }
}
