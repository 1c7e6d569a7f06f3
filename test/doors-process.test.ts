import { spawn, type ChildProcess } from 'node:child_process'
import { existsSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, expect, test, vi } from 'vitest'
import { main } from '@fleetkey/cli/main.ts'
import { openWorld, until, type World } from './world.ts'

const program = (name: string): string => fileURLToPath(new URL(`../${name}/main.ts`, import.meta.url))
const methods = ['tpm2', 'idevid', 'token'] as const

let world: World
const children: ChildProcess[] = []
const at = (...names: string[]): string => join(world.folder, ...names)

/** One command line of an operator: what it wrote. */
const fleetkey = async (...words: string[]): Promise<string> => {
  let stdout = ''
  const spy = vi.spyOn(process.stdout, 'write').mockImplementation((text) => ((stdout += String(text)), true))
  try {
    expect([words.join(' '), await main([...words, '--data', at('server')], {})]).toEqual([words.join(' '), 0])
  } finally {
    spy.mockRestore()
  }
  return stdout
}

/** A child process and the lines that it says. */
const start = (name: string, words: readonly string[], heard: (line: string) => void): ChildProcess => {
  const child = spawn(process.execPath, [program(name), ...words], { stdio: ['ignore', 'pipe', 'pipe'] })
  children.push(child)
  for (const stream of [child.stdout, child.stderr]) {
    let rest = ''
    stream.on('data', (chunk: Buffer) => {
      const lines = `${rest}${chunk.toString()}`.split('\n')
      rest = lines.pop() ?? ''
      for (const line of lines) heard(line)
    })
  }
  return child
}
const finished = async (child: ChildProcess): Promise<number | null> =>
  child.exitCode ?? (await new Promise((resolve) => void child.once('exit', (code) => resolve(code))))

interface Said {
  readonly serial?: string
  readonly device?: string | null
  readonly current?: Readonly<Record<string, number>>
  readonly holdings?: readonly { readonly key: string }[]
}
const boards = new Map<string, Said>()
const hear = (line: string): void => {
  const said = line.startsWith('{') ? (JSON.parse(line) as Said) : {}
  if (said.serial !== undefined) boards.set(said.serial, said)
}
const uses = (key: string, epoch: number, of: (serial: string) => boolean = () => true): boolean =>
  [...boards].filter(([serial]) => of(serial)).every(([, { current }]) => current?.[key] === epoch)

beforeAll(async () => {
  world = await openWorld()
  writeFileSync(at('bundle.json'), JSON.stringify(world.bundle))
})
afterAll(async () => {
  for (const child of children) child.kill('SIGTERM')
  await Promise.all(children.map(finished))
  await world.stop()
})

/** One operator's day: factories of all three kinds, every command as it is typed, the real agent on every board. */
test('three kinds of boards: made, imported, enrolled, keyed, rotated, revoked', { timeout: 240_000 }, async () => {
  await fleetkey('group', 'create', 'plant')
  await fleetkey('key', 'create', 'telemetry', '--protection', 'sealed')
  await fleetkey('key', 'create', 'command-auth', '--protection', 'tpm')
  for (const key of ['telemetry', 'command-auth']) await fleetkey('key', 'grant', key, 'plant')
  for (const method of methods) {
    const line = at(method)
    const order = ['--method', method, '--devices', '2', '--model', 'sensor', '--batch', method, '--station', method]
    const made = start('firmware-sim', ['factory', '--out', line, ...order], () => undefined)
    expect(await finished(made)).toBe(0)
    await fleetkey('station', 'add', method, join(line, 'station.pem'))
    if (method === 'tpm2') await fleetkey('endorsement', 'import', join(line, 'ek-ca.pem'), '--test')
    if (method === 'tpm2') await fleetkey('release', 'import', join(line, 'release.json'), '--station', method)
    if (method === 'idevid') await fleetkey('endorsement', 'import', join(line, 'idevid-ca.pem'), '--for', 'idevid', '--test')
    // CSV once, JSON otherwise.
    const manifest = method === 'idevid' ? ['batch.csv', '--batch', method] : ['batch.json']
    await fleetkey('batch', 'import', join(line, manifest[0] ?? ''), ...manifest.slice(1), '--station', method)
    await fleetkey('group', 'add', 'plant', '--batch', method)
  }
  const tokens = at('tokens')
  await fleetkey('token', 'create', '--batch', 'token', '--count', '2', '--expires', '1h', '--out', tokens)
  expect(statSync(tokens).mode & 0o777).toBe(0o600)
  for (const method of methods) {
    const words = ['run', '--factory', at(method), '--bundle', at('bundle.json'), '--data', at(`boards-${method}`)]
    start('firmware-sim', [...words, ...(method === 'token' ? ['--tokens', tokens] : [])], hear)
  }
  await until('six boards use the key', () => boards.size === 6 && uses('telemetry', 1), 120_000)
  await until('those with a TPM have the other too', () => uses('command-auth', 1, (serial) => serial.includes('TPM2')), 60_000)
  for (const [serial, { holdings }] of boards) expect([serial, holdings?.length]).toEqual([serial, serial.includes('TPM2') ? 2 : 1])
  for (const line of readFileSync(tokens, 'utf8').trim().split('\n')) expect(JSON.stringify([...boards.values()])).not.toContain(line.slice(30))

  await fleetkey('key', 'rotate', 'telemetry')
  await until('all use the next epoch', () => uses('telemetry', 2), 60_000)
  const list = await fleetkey('device', 'list', '--json')
  const levels = (JSON.parse(list) as { batch: string; assurance: string; state: string }[]).map(
    ({ batch, assurance, state }) => `${batch} ${assurance} ${state}`,
  )
  expect(new Set(levels)).toEqual(new Set(['tpm2 simulated enrolled', 'idevid simulated enrolled', 'token token enrolled']))

  for (const method of ['idevid', 'token']) await fleetkey('device', 'revoke', `sensor-${method}-0001`, '--reason', 'lost')
  const revoked = (serial: string): boolean => /(IDEVID|TOKEN)-0001$/.test(serial)
  await until('the others go on', () => uses('telemetry', 4, (serial) => !revoked(serial)), 60_000)
  for (const [serial, { current }] of boards) if (revoked(serial)) expect([serial, (current?.['telemetry'] ?? 0) < 4]).toEqual([serial, true])
  const shown = await fleetkey('token', 'list', '--batch', 'token', '--json')
  expect((JSON.parse(shown) as { state: string; spentBy: string }[]).map(({ state, spentBy }) => `${state} ${spentBy}`).toSorted()).toEqual([
    'spent sensor-token-0001',
    'spent sensor-token-0002',
  ])
})

test('the agent as a device runs it: a factory identity in files, and a token in a file', { timeout: 120_000 }, async () => {
  const line = at('line-4')
  const words = (method: string): string[] => ['factory', '--out', `${line}-${method}`, '--method', method, '--devices', '1', '--batch', `${method}-4`]
  for (const method of ['idevid', 'token']) {
    expect(await finished(start('firmware-sim', [...words(method), '--station', `four-${method}`], () => undefined))).toBe(0)
    await fleetkey('station', 'add', `four-${method}`, join(`${line}-${method}`, 'station.pem'))
    if (method === 'idevid') await fleetkey('endorsement', 'import', join(`${line}-idevid`, 'idevid-ca.pem'), '--for', 'idevid', '--test')
    await fleetkey('batch', 'import', join(`${line}-${method}`, 'batch.json'), '--station', `four-${method}`)
    await fleetkey('group', 'add', 'plant', '--batch', `${method}-4`)
  }
  const printed = await fleetkey('token', 'create', '--batch', 'token-4', '--device', 'gateway-token-4-0001', '--expires', '1h', '--json')
  const [token] = JSON.parse(printed) as { token: string }[]
  writeFileSync(at('enrolment.token'), `${token?.token ?? ''}\n`, { mode: 0o600 })
  const element = join(`${line}-idevid`, 'boards', 'GATEWAY-IDEVID-4-0001.idevid')
  const devices = [
    { name: 'se', serial: 'GATEWAY-IDEVID-4-0001', proof: { idevid: { key: element, certificates: element } } },
    { name: 'pl', serial: 'GATEWAY-TOKEN-4-0001', proof: { token: 'enrolment.token' } },
  ]
  for (const { name, serial, proof } of devices) {
    const config = at(`${name}.json`)
    const outputs = [{ key: 'telemetry', path: at(`${name}.key`), mode: '0600' }]
    writeFileSync(config, JSON.stringify({ bundle: 'bundle.json', data: `state-${name}`, serial, socket: null, outputs, ...proof }))
    start('device-agent', ['run', '--config', config], () => undefined)
  }
  await until('both have given out the key', () => devices.every(({ name }) => existsSync(at(`${name}.key`))), 60_000)
  expect(readFileSync(at('se.key'))).toEqual(readFileSync(at('pl.key')))
  await until('the token is gone', () => !existsSync(at('enrolment.token')))
})

const wrong: readonly (readonly [string, readonly string[], number, RegExp])[] = [
  ['no batch', ['token', 'create', '--expires', '1h'], 1, /--batch BATCH is missing/],
  ['no end', ['token', 'create', '--batch', 'token'], 1, /--expires DURATION/],
  ['one device and many', ['token', 'create', '--batch', 'token', '--expires', '1h', '--device', 'a', '--count', '2'], 1, /--device or --count, not both/],
  ['a batch that is not there', ['token', 'create', '--batch', 'none', '--expires', '1h'], 3, /no batch none/],
  ['longer than a year', ['token', 'create', '--batch', 'token', '--expires', '400d'], 3, /validFor/],
  ['no id of a token', ['token', 'revoke', 'none'], 1, /no token id/],
  ['a token that is not there', ['token', 'revoke', '0'.repeat(32)], 3, /no token/],
  ['a CA for something else', ['endorsement', 'import', 'x.pem', '--for', 'tls'], 1, /x\.pem|--for takes ek or idevid/],
]
test.each(wrong)('%s: said in a line, with its exit code', async (_what, words, code, says) => {
  let stderr = ''
  const spy = vi.spyOn(process.stderr, 'write').mockImplementation((text) => ((stderr += String(text)), true))
  try {
    expect(await main([...words, '--data', at('server')], {})).toBe(code)
  } finally {
    spy.mockRestore()
  }
  expect(stderr).toMatch(says)
})
