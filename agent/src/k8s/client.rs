//! The way to the API server: from within a pod by its service account, or by a kubeconfig.
//!
//! Connections that stand idle are kept under watch by the kernel (keep-alive, and a bound on what
//! may stay unacknowledged): a watch only reads, so without that an API server whose machine lost
//! its power would be missed for minutes.

use std::{path::PathBuf, time::Duration};

use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
pub use kube::Client;
use kube::{
    Config,
    client::{Body, ClientBuilder, ConfigExt},
    config::{KubeConfigOptions, Kubeconfig},
};
use tower::{BoxError, ServiceBuilder};

/// To connect, and for a connection to show signs of life.
const CONNECT: Duration = Duration::from_secs(5);
const ALIVE: Duration = Duration::from_secs(10);
/// Nothing at all within this: not a watch either, which says something every minute.
pub(super) const SILENT: Duration = Duration::from_secs(150);

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "no API server is known: run in a pod with a service account, name a kubeconfig by \
         --kubeconfig, or use local mode with --manifests and --ca-dir: {0}"
    )]
    NotInPod(#[source] kube::config::InClusterError),
    #[error("--kubeconfig {path}: {source}")]
    Kubeconfig {
        path: PathBuf,
        source: kube::config::KubeconfigError,
    },
    #[error("the API server's address or credentials cannot be used: {0}")]
    Unusable(#[from] kube::Error),
}

/// `kubeconfig` wins over the pod's own account.
pub async fn connect(kubeconfig: Option<PathBuf>) -> Result<Client, ClientError> {
    let mut config = match kubeconfig {
        None => Config::incluster().map_err(ClientError::NotInPod)?,
        Some(path) => {
            let wrong = |source| ClientError::Kubeconfig {
                path: path.clone(),
                source,
            };
            let read = Kubeconfig::read_from(&path).map_err(wrong)?;
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
                .await
                .map_err(wrong)?
        }
    };
    config.connect_timeout = Some(CONNECT);
    client(config)
}

/// As the library would make it, but for the sockets' settings.
fn client(config: Config) -> Result<Client, ClientError> {
    let mut sockets = HttpConnector::new();
    sockets.enforce_http(false);
    sockets.set_connect_timeout(config.connect_timeout);
    sockets.set_keepalive(Some(ALIVE));
    sockets.set_keepalive_interval(Some(ALIVE));
    sockets.set_keepalive_retries(Some(3));
    sockets.set_tcp_user_timeout(Some(3 * ALIVE));
    let mut https = hyper_timeout::TimeoutConnector::new(
        config.rustls_https_connector_with_connector(sockets)?,
    );
    https.set_read_timeout(Some(SILENT));
    let http: legacy::Client<_, Body> = legacy::Client::builder(TokioExecutor::new()).build(https);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}
