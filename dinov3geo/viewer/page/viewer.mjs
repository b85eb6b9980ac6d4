// The page of `dinov3geo view`: layers with opacity and legend, pixel values and similar patches on click.
import { Map, Marker, NavigationControl, ScaleControl, setWorkerUrl } from "/maplibre-gl.mjs";

setWorkerUrl(new URL("/maplibre-gl-worker.mjs", location.href).href);

const SIMILARITY = "similarity";
const TILE_SIDE = 256;

const map = new Map({
  container: "map",
  style: { version: 8, sources: {}, layers: [] },
  maxZoom: 24,
  dragRotate: false,
  pitchWithRotate: false,
  attributionControl: { compact: true },
});
map.touchZoomRotate.disableRotation();
map.addControl(new NavigationControl({ showCompass: false }));
map.addControl(new ScaleControl());

const marker = new Marker({ color: "#00b8d4", scale: 0.7 });

/** Fetches JSON; what the server refuses becomes an error with its words. */
async function fetchJson(address) {
  const response = await fetch(address);
  const content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function say(text, isError = false) {
  const message = document.getElementById("message");
  message.textContent = text;
  message.classList.toggle("error", isError);
}

function addToMap(id, layer, tiles) {
  const visibility = layer.shown ?? true ? "visible" : "none";
  map.addSource(id, {
    type: "raster",
    tiles: [location.origin + tiles],
    tileSize: TILE_SIDE,
    bounds: layer.bounds,
    maxzoom: layer.maxzoom,
  });
  map.addLayer({
    id,
    type: "raster",
    source: id,
    layout: { visibility },
    paint: { "raster-resampling": layer.kind === "image" ? "linear" : "nearest", "raster-fade-duration": 0 },
  });
}

function drawLegend(legend) {
  if (legend.classes) {
    const entries = legend.classes.map((entry) => {
      const swatch = element("span");
      swatch.style.background = entry.colour;
      return element("li", {}, swatch, entry.label);
    });
    return element("ul", { className: "classes" }, ...entries);
  }
  if (!legend.colours) return "";
  const ramp = element("div", { className: "ramp" });
  ramp.style.background = `linear-gradient(to right, ${legend.colours.join(", ")})`;
  const unit = legend.unit ? ` ${legend.unit}` : "";
  const ends = [legend.low, legend.high].map((text) => element("span", { textContent: text + unit }));
  return element("div", { className: "legend" }, ramp, element("div", { className: "ends" }, ...ends));
}

/** The controls of a layer: shown or not, opacity, legend. */
function addControls(id, layer) {
  const shown = element("input", { type: "checkbox", checked: layer.shown ?? true });
  shown.addEventListener("change", () =>
    map.setLayoutProperty(id, "visibility", shown.checked ? "visible" : "none"));
  const slider = element("input", { type: "range", min: 0, max: 100, value: 100, ariaLabel: `opacity of ${layer.name}` });
  const percent = element("output", { textContent: "100%" });
  slider.addEventListener("input", () => {
    percent.textContent = `${slider.value}%`;
    map.setPaintProperty(id, "raster-opacity", slider.value / 100);
  });
  const box = element(
    "div", { className: "layer" },
    element("label", {}, shown, layer.name),
    element("div", { className: "opacity" }, "opacity", slider, percent),
    drawLegend(layer.legend),
  );
  box.dataset.layer = id;
  document.querySelector(`[data-layer="${id}"]`)?.remove();
  document.getElementById("layers").prepend(box);
}

async function showValues({ lng, lat }) {
  const found = await fetchJson(`/value?lon=${lng}&lat=${lat}`);
  const rows = found.map((value) => {
    const row = element("tr", {}, element("td", { textContent: value.name }), element("td", { textContent: value.text }));
    row.dataset.layer = value.key;
    return row;
  });
  document.querySelector("#values tbody").replaceChildren(...rows);
  const hit = found.find((value) => value.row !== undefined);
  const degrees = `lon ${lng.toFixed(6)}, lat ${lat.toFixed(6)}`;
  document.getElementById("place").textContent =
    hit ? `x ${hit.x.toFixed(2)}, y ${hit.y.toFixed(2)} (${degrees})` : degrees;
  say("");
}

async function showSimilarity({ lng, lat }) {
  say("comparing all patches ...");
  const layer = await fetchJson(`/similarity?lon=${lng}&lat=${lat}`);
  if (map.getLayer(SIMILARITY)) {
    map.removeLayer(SIMILARITY);
    map.removeSource(SIMILARITY);
  }
  addToMap(SIMILARITY, layer, `/similarity/${layer.key.replace("_", "/")}/{z}/{x}/{y}.png`);
  addControls(SIMILARITY, layer);
  say(`similarity to the ${layer.text}`);
}

async function click(event) {
  // A copy of the world beside the first one shows the same ground.
  const place = event.lngLat.wrap();
  marker.setLngLat(event.lngLat).addTo(map);
  const mode = document.querySelector("input[name=mode]:checked").value;
  try {
    await (mode === SIMILARITY ? showSimilarity(place) : showValues(place));
  } catch (error) {
    say(error.message, true);
  }
}

async function start() {
  const { layers, similarity, bounds } = await fetchJson("/layers.json");
  document.getElementById("modes").hidden = !similarity;
  map.fitBounds(bounds, { padding: 30, animate: false });
  for (const layer of layers) {
    addToMap(layer.key, layer, `/tiles/${layer.key}/{z}/{x}/{y}.png`);
    addControls(layer.key, layer);
  }
  map.on("click", click);
  document.body.dataset.ready = "yes";
}

map.on("error", (event) => say(event.error.message, true));
map.on("load", () => start().catch((error) => say(error.message, true)));
// For tests and for the curious.
window.viewerMap = map;
