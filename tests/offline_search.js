// node offline_search.js SITE WORDS...: what the site's search finds where pages are opened as files.
// Material's own worker and index are run behind docs/javascripts/iframe-worker.js, in a page that has
// just what these need.
const fs = require("fs");
const path = require("path");
const vm = require("vm");

const [site, ...words] = process.argv.slice(2);
const run = (file, page) => vm.runInContext(fs.readFileSync(file, "utf-8"), page);

function frame(parent) {
  const target = new EventTarget();
  const page = vm.createContext({ console, MessageEvent, parent });
  page.self = page;
  page.addEventListener = target.addEventListener.bind(target);
  page.dispatchEvent = target.dispatchEvent.bind(target);
  const body = {
    append(script) {
      page.document.querySelector = () => script;
      run(new URL(script.src), page);
      script.onload();
    },
  };
  page.document = { body, createElement: () => ({}) };
  return page;
}

const page = vm.createContext({ EventTarget, MessageEvent, URL, Promise });
page.window = page;
page.location = { protocol: "file:" };
page.document = {
  baseURI: `file://${path.join(site, "api", "explaining.html")}`,
  createElement: () => ({}),
  body: {
    append(element) {
      element.contentWindow = frame(page);
      element.onload();
    },
  },
};
run(path.join(site, "javascripts", "iframe-worker.js"), page);
run(path.join(site, "search", "search_index.js"), page);

const workers = fs.readdirSync(path.join(site, "assets", "javascripts", "workers"));
const script = workers.find((name) => /^search\..*\.js$/.test(name));
const worker = vm.runInContext(`new Worker("../assets/javascripts/workers/${script}")`, page);
const { config, docs } = vm.runInContext("__index", page);
const found = {};
worker.addEventListener("message", ({ data }) => {
  if (data.type === 3) found[words.shift()] = data.data.items.map((pages) => pages[0].location);
  if (words.length) worker.postMessage({ type: 2, data: words[0] });
  else console.log(JSON.stringify(found));
});
worker.postMessage({ type: 0, data: { config, docs, options: { suggest: false } } });
