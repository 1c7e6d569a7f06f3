import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { readSettings, SettingsError } from './config.ts'

let folder: string
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'fleetkey-config-'))
})
afterEach(() => rmSync(folder, { recursive: true, force: true }))

const at = (name: string): string => join(folder, name)
const pem = (of: string): string => toPem('CERTIFICATE', new TextEncoder().encode(of))
const bundle = {
  server: 'mqtts://fleet.example:8884',
  tenant: 'plant',
  trust: [pem('root')],
  chain: [pem('issuing')],
  keys: [`${pem('challenge')}${pem('delivery')}`],
}
const agent = { bundle: 'bundle.json', data: 'state', tpm: 'device:/dev/tpmrm0', serial: 'SN-1' }

const read = (config: unknown, of: unknown = bundle) => {
  writeFileSync(at('bundle.json'), typeof of === 'string' ? of : JSON.stringify(of))
  writeFileSync(at('agent.json'), typeof config === 'string' ? config : JSON.stringify(config))
  return readSettings(at('agent.json'))
}
const messageOf = (run: () => unknown): string => {
  try {
    run()
  } catch (thrown) {
    if (thrown instanceof SettingsError) return thrown.message.replaceAll(folder, '.')
    throw thrown
  }
  return 'nothing thrown'
}

test('the least that is needed', () => {
  const bytes = (of: string) => new TextEncoder().encode(of)
  expect(read(agent)).toEqual({
    server: { host: 'fleet.example', port: 8884 },
    tenant: 'plant',
    trust: { trust: [bytes('root')], chain: [bytes('issuing')], keys: [bytes('challenge'), bytes('delivery')] },
    data: at('state'),
    tpm: 'device:/dev/tpmrm0',
    serial: 'SN-1',
    eventLog: '/sys/kernel/security/tpm0/binary_bios_measurements',
    imaList: '/sys/kernel/security/ima/binary_runtime_measurements',
    socket: null,
    outputs: [],
  })
})

test('everything that can be said; paths from the folder of the file', () => {
  const full = {
    ...agent,
    data: '/var/lib/fleetkey-agent',
    tpm: 'unix:swtpm.sock',
    eventLog: 'log.bin',
    imaList: 'ima.list',
    socket: { path: 'run/agent.sock', mode: '0600', owner: 'root', group: 0 },
    outputs: [
      { key: 'site', path: 'keys/site', format: 'json', mode: '640', owner: 0, group: 'root', hook: ['/bin/true', '-x'] },
      { key: 'site', path: '/etc/site.key' },
    ],
  }
  expect(read(full)).toMatchObject({
    data: '/var/lib/fleetkey-agent',
    tpm: `unix:${at('swtpm.sock')}`,
    eventLog: at('log.bin'),
    imaList: at('ima.list'),
    socket: { path: at('run/agent.sock'), owner: { mode: 0o600, uid: 0, gid: 0 } },
    outputs: [
      { key: 'site', path: at('keys/site'), format: 'json', owner: { mode: 0o640, uid: 0, gid: 0 }, hook: ['/bin/true', '-x'] },
      { key: 'site', path: '/etc/site.key', format: 'raw', owner: { mode: 0o600 }, hook: null },
    ],
  })
})

test('passwords of the TPM, as files', () => {
  const tpmAuth = { ownerAuthFile: 'owner.auth', lockoutAuthFile: '/etc/lockout.auth' }
  expect(read({ ...agent, tpmAuth }).tpmAuth).toEqual({ owner: at('owner.auth'), lockout: '/etc/lockout.auth' })
})

const variants: readonly (readonly [string, object, object, object])[] = [
  ['a socket as its path: for owner and group', { socket: 'a.sock' }, {}, { socket: { owner: { mode: 0o660 } } }],
  ['no event log', { eventLog: null }, {}, { eventLog: null }],
  ['no IMA list', { imaList: null }, {}, { imaList: null }],
  ['a TPM over TCP', { tpm: 'tcp:127.0.0.1:2321' }, {}, { tpm: 'tcp:127.0.0.1:2321' }],
  ['the usual port', {}, { server: 'mqtts://fleet.example' }, { server: { host: 'fleet.example', port: 8883 } }],
  ['an IPv6 address', {}, { server: 'mqtts://[2001:db8::1]:1' }, { server: { host: '2001:db8::1', port: 1 } }],
]
const proofs: readonly (readonly [string, object, () => object])[] = [
  [
    'a factory identity',
    { idevid: { key: 'se.key', certificates: '/etc/se.pem' } },
    () => ({ tpm: null, idevid: { key: at('se.key'), certificates: '/etc/se.pem' }, eventLog: null }),
  ],
  ['a token', { token: 'enrolment.token' }, () => ({ tpm: null, token: at('enrolment.token'), eventLog: null })],
]
test.each(proofs)('%s in the place of a TPM', (_name, proof, want) => {
  const { tpm: _tpm, eventLog: _log, ...rest } = agent as Record<string, unknown>
  expect(read({ ...rest, ...proof })).toMatchObject(want())
})

test.each(variants)('%s', (_name, config, changed, want) => expect(read({ ...agent, ...config }, { ...bundle, ...changed })).toMatchObject(want))

const withoutBundle = { data: 'state', tpm: 'device:/dev/tpmrm0' }
const bad: readonly (readonly [string, unknown, unknown, string | RegExp])[] = [
  ['not JSON', '{"bundle":', bundle, /^configuration \.\/agent\.json is not JSON: /],
  ['no object', 7, bundle, /^configuration \.\/agent\.json: the file: Invalid input: expected object/],
  ['a field missing', withoutBundle, bundle, /^configuration \.\/agent\.json: bundle: Invalid input: expected string/],
  ['a field that is spelled wrong', { ...agent, Serial: 'x' }, bundle, 'configuration ./agent.json: the file: Unrecognized key: "Serial"'],
  ['a TPM and a token', { ...agent, token: 'a' }, bundle, 'configuration: exactly one of "tpm", "idevid" and "token" says how this device proves what it is'],
  ['no way to prove what it is', { bundle: 'bundle.json', data: 'state', serial: 'x' }, bundle, /^configuration: exactly one of/],
  ['a TPM of no kind', { ...agent, tpm: '/dev/tpm0' }, bundle, 'configuration ./agent.json: tpm: expected device:/dev/tpmrm0, unix:PATH or tcp:HOST:PORT'],
  [
    'a password in the configuration itself',
    { ...agent, tpmAuth: { owner: 'secret' } },
    bundle,
    'configuration ./agent.json: tpmAuth: Unrecognized key: "owner"',
  ],
  ['an empty serial', { ...agent, serial: '' }, bundle, /agent\.json: serial: Too small/],
  ['a mode in decimal', { ...agent, socket: { path: 'a', mode: '4321' } }, bundle, /agent\.json: socket\.mode: expected an octal mode such as "0640"$/],
  [
    'a mode that is a number',
    { ...agent, outputs: [{ key: 'site', path: 'a', mode: 640 }] },
    bundle,
    /agent\.json: outputs\.0\.mode: Invalid input: expected string/,
  ],
  [
    'a mode out of range',
    { ...agent, outputs: [{ key: 'site', path: 'a', mode: '0680' }] },
    bundle,
    /outputs\.0\.mode: expected an octal mode such as "0640"$/,
  ],
  ['a key name that is none', { ...agent, outputs: [{ key: 'Site Key', path: 'a' }] }, bundle, /outputs\.0\.key: Invalid string/],
  ['an empty hook', { ...agent, outputs: [{ key: 'site', path: 'a', hook: [] }] }, bundle, /outputs\.0\.hook: Too small/],
  [
    'a hook that is a shell line',
    { ...agent, outputs: [{ key: 'site', path: 'a', hook: 'systemctl reload x' }] },
    bundle,
    /outputs\.0\.hook: .*expected array/,
  ],
  ['an account that is not here', { ...agent, socket: { path: 'a', owner: 'nobody-of-that-name' } }, bundle, '/etc/passwd has no nobody-of-that-name'],
  ['a group that is not here', { ...agent, outputs: [{ key: 'site', path: 'a', group: 'no-such-group' }] }, bundle, '/etc/group has no no-such-group'],
  [
    'a socket path that is too long',
    { ...agent, socket: `/run/${'x'.repeat(103)}` },
    bundle,
    /^socket: \/run\/x+ has more than 107 bytes; choose a short path/,
  ],
  [
    'two outputs with one path',
    {
      ...agent,
      outputs: [
        { key: 'site', path: 'a' },
        { key: 'other', path: './a' },
      ],
    },
    bundle,
    'outputs: two of them write ./a',
  ],
  ['no bundle', { ...agent, bundle: 'none.json' }, bundle, /^bundle \.\/none\.json: ENOENT/],
  ['a bundle that is not JSON', agent, 'PEM', /^bundle \.\/bundle\.json is not JSON: /],
  ['a bundle without trust', agent, { ...bundle, trust: [] }, /^bundle \.\/bundle\.json: trust: Too small/],
  ['a server without TLS', agent, { ...bundle, server: 'mqtt://fleet.example:1883' }, 'bundle: server "mqtt://fleet.example:1883" is not mqtts://HOST:PORT'],
  ['a server that is no address', agent, { ...bundle, server: 'fleet.example' }, 'bundle: server "fleet.example" is not mqtts://HOST:PORT'],
  ['a tenant that is none', agent, { ...bundle, tenant: 'Plant 1' }, 'bundle: tenant "Plant 1"'],
  ['a certificate that is none', agent, { ...bundle, keys: ['none'] }, 'bundle: keys: 0 PEM blocks of CERTIFICATE'],
  [
    'a private key in the place of a root',
    agent,
    { ...bundle, trust: [toPem('PRIVATE KEY', new Uint8Array(8))] },
    'bundle: trust: 0 PEM blocks of CERTIFICATE',
  ],
]
test.each(bad)('%s', (_name, config, of, want) => {
  const message = messageOf(() => read(config, of))
  if (typeof want === 'string') expect(message).toBe(want)
  else expect(message).toMatch(want)
})

test('no configuration at all', () => expect(messageOf(() => readSettings(at('none.json')))).toMatch(/^configuration \.\/none\.json: ENOENT/))
