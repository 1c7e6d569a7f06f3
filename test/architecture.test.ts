import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, it } from 'vitest'

const root = fileURLToPath(new URL('..', import.meta.url))

/**
 * Who may import whom: the longest matching folder decides. `main > api, store, kms > flows > nouns > protocol, tpm2`.
 * To change the rule, change this table and say why.
 */
const nouns = ['server/attestation', 'server/ca', 'server/keys', 'server/campaigns', 'server/fleet', 'server/access', 'server/audit']
const common = ['protocol', 'tpm2']
const may: Readonly<Record<string, readonly string[]>> = {
  protocol: [],
  tpm2: [],
  ...Object.fromEntries(nouns.map((noun) => [noun, common])),
  'server/flows': [...common, ...nouns],
  'server/store': [...common, ...nouns, 'server/flows'],
  'server/kms': ['protocol', 'server/flows'],
  'server/api': [...common, ...nouns, 'server/flows'],
  server: [...common, ...nouns, 'server/flows', 'server/store', 'server/kms', 'server/api'],
  'device-agent': common,
  'firmware-sim': [...common, 'device-agent', 'firmware-sim/fleet'],
  // A fleet hands its batch to a server as an operator does, by the operator's own client.
  'firmware-sim/fleet': [...common, 'device-agent', 'firmware-sim', 'cli'],
  cli: ['protocol'],
  // Offline judgements are the server's own pure functions: a second implementation of them would be a second truth.
  'cli/offline': [...common, 'server/attestation', 'server/ca', 'server/audit', 'cli'],
  demo: ['protocol'],
  // An application on a device: the agent's client library is for it.
  'demo/telemetry.ts': ['device-agent'],
  // Only these bring server and agent together.
  test: [
    ...common,
    ...nouns,
    'server/flows',
    'server/store',
    'server/kms',
    'server/api',
    'server',
    'device-agent',
    'firmware-sim',
    'firmware-sim/fleet',
    'cli',
    'cli/offline',
    'demo',
    'bench',
  ],
  bench: [
    ...common,
    ...nouns,
    'server/flows',
    'server/store',
    'server/kms',
    'server/api',
    'server',
    'device-agent',
    'firmware-sim',
    'firmware-sim/fleet',
    'cli',
    'test',
  ],
}

/** Packages from outside, and the only places that may know them. */
const confined: Readonly<Record<string, readonly string[]>> = {
  'better-sqlite3': ['server/store', 'bench'],
  'drizzle-orm': ['server/store'],
  // demo/plant.ts is the plant's own broker, which Fleetkey is not part of.
  aedes: ['server/api/broker', 'demo/plant.ts'],
  mqtt: ['device-agent/connection.ts', 'demo/plant.ts', 'demo/telemetry.ts'],
  '@peculiar/x509': ['protocol/x509/library.ts'],
  '@peculiar/webcrypto': ['protocol/x509/library.ts'],
  cborg: ['protocol/cbor.ts'],
  'shamir-secret-sharing': ['server/kms/shares.ts'],
}

const sources = (folder: string): string[] =>
  readdirSync(join(root, folder), { withFileTypes: true }).flatMap((entry) => {
    const path = `${folder}/${entry.name}`
    if (entry.isDirectory()) return entry.name === 'node_modules' ? [] : sources(path)
    return entry.name.endsWith('.ts') ? [path] : []
  })

const workspaces = ['protocol', 'tpm2', 'server', 'device-agent', 'firmware-sim', 'cli', 'demo', 'test', 'bench']
const files = workspaces.flatMap(sources)
const isTest = (path: string): boolean => path.endsWith('.test.ts')

/** What a file imports: ours as a path from the root, others as the package's name. */
const importsOf = (path: string): { ours: string[]; packages: string[] } => {
  const text = readFileSync(join(root, path), 'utf8')
  const named = [
    ...text.matchAll(/^\s*(?:import|export)\b[^'";]*?['"]([^'"]+)['"]/gm),
    ...text.matchAll(/\bimport\(\s*['"]([^'"]+)['"]/g),
    ...text.matchAll(/import\.meta\.resolve\(['"]([^'"]+)['"]/g),
  ].map(([, name = '']) => name)
  const ours = named.flatMap((name) =>
    name.startsWith('.') ? [relative(root, join(root, dirname(path), name))] : name.startsWith('@fleetkey/') ? [name.slice('@fleetkey/'.length)] : [],
  )
  const packages = named
    .filter((name) => !name.startsWith('.') && !name.startsWith('@fleetkey/') && !name.startsWith('node:'))
    .map((name) =>
      name
        .split('/')
        .slice(0, name.startsWith('@') ? 2 : 1)
        .join('/'),
    )
  return { ours, packages }
}

const under = (path: string, place: string): boolean => path === place || path.startsWith(`${place}/`)
/** The row of the table that a file belongs to: the longest folder that holds it. */
const rowOf = (path: string): string =>
  Object.keys(may)
    .filter((row) => under(path, row))
    .toSorted((one, other) => other.length - one.length)[0] ?? 'nowhere'

it('has a row for every file', () => expect(files.filter((path) => rowOf(path) === 'nowhere')).toEqual([]))

it('imports only downwards', () => {
  const wrong = files.flatMap((path) => {
    const row = rowOf(path)
    return importsOf(path)
      .ours.filter((target) => {
        const to = rowOf(target)
        // A test beside the code may use the shared harness and suites.
        if (to === row || (isTest(path) && to === 'test')) return false
        // `server start` starts the server; it does not import it.
        if (path === 'cli/commands/server.ts' && target === 'server/main.ts') return false
        if (row === 'cli' && to === 'cli/offline') return false
        return !(may[row] ?? []).includes(to)
      })
      .map((target) => `${path} imports ${target}`)
  })
  expect(wrong).toEqual([])
})

/** What holds private keys, or opens them. */
const keyCode = [
  'open',
  'custody',
  'joined',
  'pkcs11/holder',
  'pkcs11/token',
  'pkcs11/keys',
  'pkcs11/pin',
  'pkcs11/cryptoki',
  'safe',
  'file',
  'master',
  'slots',
  'shares',
  'cell',
  'process',
  'lock',
].map((name) => `server/kms/${name}.ts`)

it('loads the code that opens private keys in the KMS process only', () => {
  const [reached, next] = [new Set<string>(), ['server/main.ts']]
  for (let path = next.pop(); path !== undefined; path = next.pop()) {
    if (reached.has(path)) continue
    reached.add(path)
    next.push(...importsOf(path).ours.filter((target) => target.endsWith('.ts')))
  }
  expect(reached.has('server/kms/supervisor.ts')).toBe(true)
  expect(keyCode.filter((path) => !files.includes(path) || reached.has(path))).toEqual([])
})

it('keeps each foreign library in its place', () => {
  const wrong = files.flatMap((path) =>
    isTest(path) || under(path, 'test')
      ? []
      : importsOf(path)
          .packages.filter((name) => confined[name] !== undefined && !confined[name].some((place) => under(path, place)))
          .map((name) => `${path} imports ${name}`),
  )
  expect(wrong).toEqual([])
})

it('takes time and randomness as arguments in the pure parts', () => {
  const pure = files.filter((path) => !isTest(path) && [...nouns, 'protocol', 'server/flows'].some((place) => under(path, place)))
  const wrong = pure.filter((path) => /\bDate\.now\(\)|\bnew Date\(\)|\bMath\.random\(/.test(readFileSync(join(root, path), 'utf8')))
  expect(wrong).toEqual([])
})

it('speaks of itself alone: no machine path, no registry host', () => {
  const words = /(^|[^a-z.])\/(work|farm)\/[a-z]|registry\.[a-z]+\.org|deb\.debian\.org/
  const wrong = [...files, 'README.md', 'package.json', 'setup.mjs', '.ci/run', ...readdirSync(join(root, 'docs')).map((name) => `docs/${name}`)].filter(
    (path) => path !== 'test/architecture.test.ts' && words.test(readFileSync(join(root, path), 'utf8')),
  )
  expect(wrong).toEqual([])
})
