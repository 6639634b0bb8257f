//! The metrics on a TCP address, for a Prometheus that has no right to the socket of the API. It answers nothing else.

use super::{
    handlers,
    limits::{SCRAPE, SCRAPES},
    metrics::MEDIA_TYPE,
    server::Api,
    socket::accept,
};
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

/// How long to wait before an address is tried again that could not be had.
const AGAIN: Duration = Duration::from_secs(10);

/// Serves the metrics where the fleet file says, also after it says something else; for ever.
pub(super) async fn serve(api: &Arc<Api>) {
    let mut fleets = api.supervisor.watch_fleet();
    loop {
        let address = fleets.borrow_and_update().metrics.listen.clone();
        let changed = async {
            // What else changes is not looked at: a listener that stays loses no client.
            while fleets.changed().await.is_ok() {
                if fleets.borrow().metrics.listen != address {
                    return;
                }
            }
            std::future::pending().await
        };
        tokio::select! {
            () = changed => {}
            () = listen(api, address.as_deref()) => {}
        }
    }
}

async fn listen(api: &Arc<Api>, address: Option<&str>) {
    let Some(address) = address else { return std::future::pending().await };
    match TcpListener::bind(address).await {
        Ok(listener) => {
            let places = Arc::new(Semaphore::new(SCRAPES));
            loop {
                let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
                if let Some((stream, _)) = accept(listener.accept(), Duration::from_millis(100)).await {
                    let api = Arc::clone(api);
                    tokio::spawn(async move {
                        let _ = timeout(SCRAPE, answer(stream, api)).await;
                        drop(place);
                    });
                }
            }
        }
        Err(error) => {
            tracing::error!(address, %error, "cannot listen for metrics");
            sleep(AGAIN).await;
        }
    }
}

async fn answer(stream: TcpStream, api: Arc<Api>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let api = Arc::clone(&api);
        async move {
            let found = request.method() == Method::GET && request.uri().path() == "/metrics";
            let text = if found {
                handlers::metrics_text(&api).await
            } else {
                "There is only GET /metrics\n".into()
            };
            let mut response = Response::new(Full::new(Bytes::from(text)));
            let media_type = if found { MEDIA_TYPE } else { "text/plain" };
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
            if !found {
                *response.status_mut() = StatusCode::NOT_FOUND;
            }
            Ok::<_, Infallible>(response)
        }
    });
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .max_buf_size(8 << 10)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}
