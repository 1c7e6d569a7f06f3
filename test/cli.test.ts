import { execFile } from 'node:child_process'
import { generateKeyPairSync } from 'node:crypto'
import { chmodSync, existsSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { batchRadiusText } from '@fleetkey/cli/commands/blast-radius.ts'
import { createOutput, table } from '@fleetkey/cli/output.ts'
import { signMessage, keyId } from '@fleetkey/protocol/signed.ts'
import { DeviceId, KeyId, TenantId } from '@fleetkey/protocol/ids.ts'
import { certificateBytes } from '@fleetkey/protocol/x509/pem.ts'
import { fleetkey, type Outcome } from './command-line.ts'
import { ecdsaSigner } from './signer.ts'
import { openWorld, until, type World } from './world.ts'

const root = fileURLToPath(new URL('..', import.meta.url))
let world: World
const at = (name: string): string => join(world.folder, name)
const data = (): string => at('server')

const here = async (...words: string[]): Promise<Outcome> => await fleetkey([...words, '--data', data()])

/** The same as a process of its own. */
const spawned = async (file: string, words: readonly string[]): Promise<Outcome> =>
  await new Promise((resolve) => {
    execFile(file, words, { cwd: root, timeout: 50_000 }, (error, stdout, stderr) =>
      resolve({ code: error === null ? 0 : typeof error.code === 'number' ? error.code : 128, stdout, stderr }),
    )
  })

beforeAll(async () => {
  world = await openWorld({ args: ['--http-port', '0'] })
  const machines = await Promise.all(['GW-1', 'GW-2'].map(async (serial) => await world.simulated(serial)))
  await world.enlist(machines, 'plant')
  // Enrolled, and switched off again.
  const agents = machines.map((machine) => world.agent(machine))
  await until('both are enrolled', () => agents.every((agent) => agent.status().connected))
  for (const agent of agents) await agent.stop()
}, 60_000)
afterAll(async () => await world.stop())

describe('as a person types it in a clone', () => {
  test.each([
    ['fleetkey', ['--help'], /fleetkey server start .*--mqtt-port/],
    ['fleetkey-agent', ['--help'], /usage: fleetkey-agent run/],
    ['fleetkey-sim', ['--help'], /usage: fleetkey-sim factory/],
  ])('npx %s', async (name, words, want) => {
    const { code, stdout, stderr } = await spawned('npx', ['--no-install', name, ...words])
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
    expect(stdout).toMatch(want)
  })

  test('a server that cannot start says why in one line, and leaves with 5', async () => {
    const start = async (...words: string[]): Promise<Outcome> => await spawned(process.execPath, [join(root, 'cli/main.ts'), 'server', 'start', ...words])
    const locked = await start('--data', data())
    expect(locked).toMatchObject({ code: 5, stdout: '' })
    expect(locked.stderr).toMatch(/^fleetkey server: .* is in use by process \d+[^\n]*\n$/)
    const busy = await start('--data', at('second'), '--mqtt-port', String(world.server.mqttPort), '--https-port', '0')
    expect(busy.code).toBe(5)
    expect(busy.stderr).toMatch(/fleetkey server: listen EADDRINUSE: address already in use 127\.0\.0\.1:\d+\n$/)
    const wrong = await start('--data', at('third'), '--mqtt-port', 'abc')
    expect(wrong).toMatchObject({ code: 1, stderr: 'fleetkey server: --mqtt-port: not a number\n' })
    expect(existsSync(at('third'))).toBe(false)
  })

  test('a folder that cannot be one for data: said at once, in one line, with 1', async () => {
    writeFileSync(at('in-the-way'), '')
    const starts = ['/proc/x', '/proc/x/y', at('in-the-way'), at('in-the-way/data')].map(async (folder) => {
      const { code, stdout, stderr } = await spawned(process.execPath, [join(root, 'cli/main.ts'), 'server', 'start', '--data', folder])
      expect({ code, stdout }).toEqual({ code: 1, stdout: '' })
      expect(stderr).toMatch(new RegExp(`^fleetkey server: --data ${folder}: E[A-Z]+: [^\\n]*\\n$`))
    })
    await Promise.all(starts)
  })
})

describe('exit code 1, usage: said before anything is asked', () => {
  const cases: readonly (readonly [string, () => string[], RegExp])[] = [
    ['an unknown command', () => ['frobnicate'], /no command 'frobnicate'/],
    ['half a command', () => ['device'], /no command 'device'; there are: device list, device show/],
    ['another word of a command', () => ['ca', 'renew'], /no command 'ca renew'; there are: ca status, ca prepare/],
    ['a command by what it is about', () => ['certificate', 'list'], /no command 'certificate list'; see: .*ca list/],
    ['a missing argument', () => ['station', 'add', 'x'], /an argument is missing\nusage: fleetkey station add/],
    ['an argument too many', () => ['batch', 'show', 'a', 'b'], /'b' is one argument too many/],
    ['an unknown option', () => ['device', 'list', '--nonsense'], /^fleetkey: Unknown option '--nonsense'\nusage: fleetkey device list/],
    ['a missing option', () => ['device', 'revoke', 'gw-1'], /--reason TEXT is missing/],
    ['another value than the option takes', () => ['key', 'create', 'k', '--protection', 'gold'], /takes sealed or tpm, not gold/],
    ['no device id', () => ['device', 'show', 'GW 1'], /'GW 1' is no device id/],
    ['no number', () => ['audit', 'list', '--limit', 'many'], /--limit takes a number from 1 to 1000/],
    ['no duration', () => ['campaign', 'watch', 'c', '--for', 'soon'], /--for takes a duration/],
    ['no date', () => ['batch', 'window', 'b', '--claim-until', '31.3.2027'], /--claim-until takes a date such as 2027-03-31/],
    ['a date that is not in the calendar', () => ['batch', 'window', 'b', '--claim-until', '2027-02-31'], /--claim-until takes a date/],
    ['a window without its end', () => ['batch', 'window', 'b'], /--claim-until DATE\|none is missing/],
    ['waves that do not end with 1', () => ['key', 'rotate', 'k', '--waves', '0.5,0.2'], /--waves takes ascending shares/],
    ['a wave of no device', () => ['key', 'rotate', 'k', '--waves', '0dev,1'], /10dev,0\.1,1, not 0dev,1/],
    ['a window without its end', () => ['key', 'rotate', 'k', '--window', 'mon@22:00'], /--window takes times such as/],
    ['a window on no day', () => ['campaign', 'create', 'k', '--window', 'someday@22:00-23:00'], /--window takes times such as/],
    ['half a device', () => ['key', 'rotate', 'k', '--concurrency', '1.5'], /--concurrency takes a whole number/],
    ['another choice', () => ['key', 'rotate', 'k', '--overlap', 'never'], /--overlap takes patient or strict, not never/],
    ['a compromise that waits', () => ['key', 'rotate', 'k', '--compromised', '--reason', 'x', '--soak', '1h'], /waits for nobody/],
    ['a cut of nobody knows how many', () => ['campaign', 'confirm', 'c'], /--cut N is missing/],
    ['a file that is not there', () => ['station', 'add', 'x', at('none.pem')], /none\.pem: ENOENT/],
    ['a file of another kind', () => ['station', 'add', 'x', join(root, 'README.md')], /README\.md: no PEM file with a PUBLIC KEY/],
    ['a certificate that is none', () => ['endorsement', 'import', join(root, 'README.md')], /README\.md: no PEM file with a CERTIFICATE/],
    ['a manifest without its signature', () => ['batch', 'import', join(root, 'README.md'), '--station', 'line-1'], /README\.md\.sig: ENOENT/],
    [
      'a manifest without station',
      () => ['release', 'import', join(root, 'README.md'), '--signature', join(root, 'README.md')],
      /--station NAME .* is missing/,
    ],
    ['a checkpoint that is not there', () => ['audit', 'verify', '--checkpoint', at('none.txt')], /none\.txt: ENOENT/],
    ['a place that cannot be written', () => ['audit', 'export', '--out', at('none/log')], /--out .*none\/log: ENOENT/],
    ['the same for the bundle', () => ['server', 'bundle', '--out', at('none/bundle')], /none\/bundle: ENOENT/],
    ['a token file that holds no token', () => ['device', 'list', '--token-file', join(root, 'README.md')], /token file .*README\.md: not a token/],
    ['a CA file that holds no CA', () => ['device', 'list', '--ca', join(root, 'README.md')], /CA file .*README\.md: no PEM certificate/],
    ['an address that is none', () => ['device', 'list', '--server', 'localhost:8443'], /--server takes an address such as https/],
    ['a file that is no message', () => ['inspect', join(root, 'README.md')], /neither a message nor CBOR/],
  ]
  test.each(cases)('%s', async (_, words, want) => {
    const { code, stdout, stderr } = await here(...words())
    expect({ code, stdout }).toEqual({ code: 1, stdout: '' })
    expect(stderr).toMatch(want)
    expect(stderr).not.toMatch(/\n\s+at /)
  })

  test('no server is named: it says how to name one', async () => {
    const { code, stderr } = await fleetkey(['device', 'list', '--data', at('nowhere')])
    expect(code).toBe(1)
    expect(stderr).toMatch(/give --server, --token-file and --ca, or --data DIR/)
    const verify = await fleetkey(['audit', 'verify', join(root, 'README.md'), '--data', at('nowhere')])
    expect(verify).toMatchObject({ code: 1, stderr: expect.stringMatching(/^fleetkey: --key PUBLIC-KEY\.pem is missing, /) as string })
  })
})

describe('what a program reads', () => {
  /** With --json: nothing on standard output, one object on standard error. */
  const errorOf = async (...words: string[]): Promise<unknown> => {
    const { code, stdout, stderr } = await here(...words, '--json')
    const told = JSON.parse(stderr) as { exit: number }
    expect({ stdout, exit: told.exit }).toEqual({ stdout: '', exit: code })
    return told
  }

  test.each([
    ['refused', ['device', 'show', 'gw-99'], { error: { code: 'not-found', message: 'no device gw-99' }, exit: 3 }],
    [
      'a missing option',
      ['device', 'revoke', 'gw-1'],
      { error: { code: 'usage', message: '--reason TEXT is missing', usage: expect.stringMatching(/^fleetkey device revoke /) }, exit: 1 },
    ],
    ['an unknown option', ['device', 'list', '--nonsense'], { error: { code: 'usage', message: "Unknown option '--nonsense'" }, exit: 1 }],
    ['an unknown command', ['frobnicate'], { error: { code: 'usage', message: expect.stringContaining('no command') }, exit: 1 }],
    [
      'nobody there',
      ['device', 'list', '--server', 'https://127.0.0.1:1'],
      { error: { code: 'unreachable', message: expect.stringContaining('ECONNREFUSED') }, exit: 2 },
    ],
  ])('%s: one object on standard error', async (_, words, want) => {
    expect(await errorOf(...words)).toMatchObject(want)
  })

  test('a token that the server does not know: said what that means', async () => {
    writeFileSync(at('unknown-token'), `${'A'.repeat(43)}\n`)
    const message = expect.stringContaining('the server knows no such token') as string
    expect(await errorOf('device', 'list', '--token-file', at('unknown-token'))).toMatchObject({ error: { code: 'unauthenticated', message }, exit: 3 })
  })

  test('a server that does not start', async () => {
    const { code, stdout, stderr } = await spawned(process.execPath, [join(root, 'cli/main.ts'), 'server', 'start', '--data', '/proc/x', '--json'])
    expect({ code, stdout }).toEqual({ code: 1, stdout: '' })
    expect(JSON.parse(stderr)).toEqual({ error: { code: 'usage', message: expect.stringMatching(/^--data \/proc\/x: ENOENT/) as string }, exit: 1 })
  })
})

test('--help after the first word of commands tells of these; after a command, of it alone', async () => {
  const names = (text: string): readonly string[] => [...text.matchAll(/^usage: fleetkey (\S+(?: [a-z0-9-]+)*)/gm)].map(([, name = '']) => name)
  const kms = await here('kms', '--help')
  expect([kms.code, names(kms.stdout)]).toEqual([0, ['kms install-pkcs11', 'kms status', 'kms rotate-kek', 'kms retire-kek']])
  expect(names((await here('group', 'policy', '--help')).stdout)).toEqual(['group policy get', 'group policy set'])
  expect((await here('kms', 'status', '--help')).stdout).toMatch(/^usage: fleetkey kms status\n[^\n]+\n$/)
  expect((await here('nonsense', '--help')).stdout).toMatch(/fleetkey server start/)
})

describe('exit code 2, remote', () => {
  test('nobody answers', async () => {
    const { code, stderr } = await here('device', 'list', '--server', 'https://127.0.0.1:1')
    expect({ code, stderr }).toEqual({ code: 2, stderr: expect.stringMatching(/^fleetkey: https:\/\/127\.0\.0\.1:1: .*ECONNREFUSED[^\n]*\n$/) })
  })

  test('somebody else answers: another CA', async () => {
    const ca = at('other.pem')
    await new Promise<void>((resolve, reject) => {
      const words = [
        'req',
        '-x509',
        '-newkey',
        'ec',
        '-pkeyopt',
        'ec_paramgen_curve:P-256',
        '-nodes',
        '-days',
        '2',
        '-subj',
        '/CN=x',
        '-keyout',
        at('other.key'),
      ]
      execFile('openssl', [...words, '-out', ca], (error) => (error === null ? resolve() : reject(error)))
    })
    const { code, stderr } = await here('device', 'list', '--ca', ca)
    expect(code).toBe(2)
    expect(stderr).toMatch(/certificate/)
  })
})

describe('exit code 3, refused', () => {
  const cases: readonly (readonly [string, () => string[], RegExp])[] = [
    ['what is not there', () => ['device', 'show', 'nobody'], /^fleetkey: not-found: no device nobody\n$/],
    ['what is there already', () => ['group', 'create', 'plant'], /^fleetkey: conflict: /],
    ['a token that nobody gave', () => ['device', 'list', '--token-file', at('stranger.token')], /^fleetkey: unauthenticated: /],
    [
      'a manifest that its station did not sign',
      () => ['batch', 'import', at('forged.json'), '--station', 'line-1'],
      /^fleetkey: forbidden: not signed by station line-1\n$/,
    ],
  ]
  test.each(cases)('%s', async (_, words, want) => {
    writeFileSync(at('stranger.token'), `${'x'.repeat(43)}\n`)
    writeFileSync(at('forged.json'), '{}')
    writeFileSync(at('forged.json.sig'), Buffer.alloc(70).toString('base64'))
    const { code, stdout, stderr } = await here(...words())
    expect({ code, stdout }).toEqual({ code: 3, stdout: '' })
    expect(stderr).toMatch(want)
  })

  test('an audit log that was edited', async () => {
    expect(await here('audit', 'export', '--out', at('log.jsonl'))).toMatchObject({ code: 0 })
    expect(statSync(at('log.jsonl')).mode & 0o777).toBe(0o600)
    expect(await here('audit', 'verify', at('log.jsonl'))).toMatchObject({
      code: 0,
      stdout: expect.stringMatching(/^\d+ entries: chain, tree and checkpoint agree\n$/),
    })
    writeFileSync(at('edited.jsonl'), readFileSync(at('log.jsonl'), 'utf8').replace('station line-1', 'station line-2').replace('"line-1"', '"line-2"'))
    expect(await here('audit', 'verify', at('edited.jsonl'))).toMatchObject({ code: 3, stdout: expect.stringMatching(/^NOT AUTHENTIC at entry \d+/) })
    // Without a server, with the key and a checkpoint that were kept.
    const { spki } = await world.client.call('audit.key')
    writeFileSync(at('audit.pem'), `-----BEGIN PUBLIC KEY-----\n${spki}\n-----END PUBLIC KEY-----\n`)
    const words = ['audit', 'verify', at('log.jsonl'), '--key', at('audit.pem'), '--data', at('nowhere')]
    expect(await fleetkey(words)).toMatchObject({ code: 0 })
  })
})

describe('exit code 4, partial', () => {
  const installing = async (id: string): Promise<void> =>
    await until('its targets are written', async () => (await world.client.call('campaign.show', { params: { id } })).state === 'installing')

  test('a rotation that not every device has proven', async () => {
    expect(await here('key', 'create', 'telemetry', '--protection', 'sealed')).toMatchObject({ code: 0 })
    expect(await here('key', 'grant', 'telemetry', 'plant')).toMatchObject({ code: 0 })
    const started = await here('key', 'rotate', 'telemetry', '--deadline', '1s', '--error-threshold', '1', '--success-threshold', '0', '--json')
    const { campaign } = JSON.parse(started.stdout) as { campaign: string }
    await installing(campaign)
    const early = await here('campaign', 'watch', campaign, '--for', '10ms')
    expect(early.code).toBe(4)
    expect(early.stderr).toMatch(/is still installing: pending 2/)
    const late = await here('campaign', 'watch', campaign, '--for', '30s', '--json')
    expect(late.code).toBe(4)
    const lines = late.stdout.trim().split('\n')
    expect(JSON.parse(lines.at(-1) ?? '')).toMatchObject({ id: campaign, counts: { 'timed-out': 2 } })
  })

  test('paused, resumed, aborted', async () => {
    const { campaign } = JSON.parse((await here('key', 'rotate', 'telemetry', '--json')).stdout) as { campaign: string }
    await installing(campaign)
    for (const [verb, state] of [
      ['pause', 'paused'],
      ['resume', 'installing'],
      ['abort', 'aborted'],
    ] as const)
      expect(await here('campaign', verb, campaign)).toMatchObject({ code: 0, stdout: `campaign ${campaign}: ${state}\n` })
    expect(await here('campaign', 'watch', campaign)).toMatchObject({ code: 4 })
  })

  test('every part of a policy is spelled, kept and shown; what waits for a person says so', async () => {
    const order = [
      'key',
      'rotate',
      'telemetry',
      '--waves',
      '1dev,0.5,1',
      '--canary',
      'plant',
      '--targets',
      'live',
      '--silent',
      'neither',
      '--manual',
      '--soak',
      '10m',
    ]
    const rest = [
      '--deadline',
      '1h',
      '--retries',
      '2',
      '--concurrency',
      '50',
      '--window',
      'mon-fri,sun@22:00-04:00+01:00',
      '--start',
      '2037-01-01T00:00:00Z',
      '--approval',
    ]
    const { campaign } = JSON.parse((await here(...order, ...rest, '--json')).stdout) as { campaign: string }
    const shown = async () => JSON.parse((await here('campaign', 'show', campaign, '--json')).stdout) as { state: string; waitsFor: string; policy: unknown }
    await until('it waits for another person', async () => (await shown()).state === 'waiting')
    expect(await shown()).toMatchObject({
      waitsFor: 'approval',
      policy: {
        waves: [{ devices: 1 }, 0.5, 1],
        canary: 'plant',
        targets: 'live',
        silent: 'neither',
        advance: 'manual',
        soak: 600_000,
        deadline: 3_600_000,
        retries: 2,
        concurrency: 50,
        window: { from: 1320, minutes: 360, days: [0, 1, 2, 3, 4, 5], offset: 60 },
        startAt: Date.UTC(2037, 0, 1),
        approval: true,
        overlap: 'patient',
      },
    })
    expect((await here('campaign', 'show', campaign)).stdout).toMatch(/window: +sun,mon,tue,wed,thu,fri@22:00-04:00\+01:00/)
    // Nobody approves what is one's own.
    expect(await here('campaign', 'approve', campaign)).toMatchObject({ code: 3, stderr: expect.stringMatching(/another person has to grant it/) as string })
    expect(await here('campaign', 'advance', campaign)).toMatchObject({ code: 3 })
    expect(await here('campaign', 'rollback', campaign)).toMatchObject({ code: 3 })
    expect(await here('campaign', 'abort', campaign)).toMatchObject({ code: 0 })
  })

  test('a strict end of the old epoch: said before, refused without agreement', async () => {
    const preview = await here('campaign', 'preview', 'telemetry')
    expect(preview.stdout).toMatch(/^2 devices; 2 of them could be cut off by a strict end of the old epoch \(--overlap strict --may-cut 2\)/)
    expect(await here('key', 'rotate', 'telemetry', '--overlap', 'strict')).toMatchObject({
      code: 3,
      stderr: expect.stringMatching(/2 devices may be cut off the old epoch, 0 were agreed to/) as string,
    })
    const { campaign } = JSON.parse((await here('key', 'rotate', 'telemetry', '--overlap', 'strict', '--may-cut', '2', '--json')).stdout) as {
      campaign: string
    }
    expect(await here('campaign', 'abort', campaign)).toMatchObject({ code: 0 })
    expect((await here('key', 'policy', 'set', 'telemetry', '--rotate-every', '90d')).stdout).toMatch(/rotated at 20/)
    expect((await here('key', 'policy', 'set', 'telemetry', '--rotate-every', 'never')).stdout).toMatch(/when somebody says so/)
    const compromised = await here('key', 'rotate', 'telemetry', '--compromised', '--reason', 'laptop stolen', '--json')
    expect(compromised.code).toBe(0)
    const key = JSON.parse((await here('key', 'show', 'telemetry', '--json')).stdout) as { epochs: readonly { state: string }[] }
    expect(key.epochs.map(({ state }) => state)).toContain('compromised')
  })
})

describe('the inventory of certificates', () => {
  interface Found {
    readonly items: readonly {
      readonly serial: string
      readonly device: string | null
      readonly profile: string
      readonly state: string
      readonly notAfter: number
    }[]
    readonly next: string | null
  }
  const list = async (...words: string[]): Promise<Found> => JSON.parse((await here('ca', 'list', '--json', ...words)).stdout) as Found

  test('by device, profile, state, serial and end; page by page', async () => {
    const own = await list('--device', 'gw-1')
    expect(own.items.map(({ profile, state }) => `${profile} ${state}`).toSorted()).toEqual(['device-identity valid', 'device-tls valid'])
    expect((await list('--device', 'gw-*', '--profile', 'device-tls')).items.map(({ device }) => device)).toEqual(['gw-1', 'gw-2'])
    expect((await list('--batch', 'batch-1')).items).toHaveLength(4)
    expect((await list('--state', 'revoked')).items).toEqual([])
    const [one] = own.items
    const [serial, notAfter] = [one?.serial ?? '', one?.notAfter ?? 0]
    expect((await list('--serial', serial.slice(0, 12))).items.map((one) => one.serial)).toEqual([serial])
    const end = new Date(notAfter).toISOString()
    expect((await list('--device', 'gw-1', '--expires-before', end)).items.map((one) => one.serial)).not.toContain(serial)
    const all = await list()
    const [first, second] = [await list('--limit', '2'), all.items.slice(2)]
    expect(first.items).toEqual(all.items.slice(0, 2))
    expect((await list('--after', first.next ?? '')).items).toEqual(second)
    expect((await here('ca', 'list', '--limit', '2')).stdout).toContain(`more: --after ${first.next}`)
    const shown = await here('ca', 'show', serial)
    expect(shown.stdout).toMatch(/serial: +[4-7][\s\S]*-----BEGIN CERTIFICATE-----/)
    expect(await here('ca', 'show', '4000')).toMatchObject({ code: 3 })
    const file = at('shown.pem')
    writeFileSync(file, shown.stdout)
    expect((await here('ca', 'show', file)).stdout).toBe(shown.stdout)
    expect(await here('ca', 'show', at('none.pem'))).toMatchObject({ code: 1 })
    // One of the same serial that this server has not written.
    const other = Uint8Array.from(certificateBytes(Buffer.from(shown.stdout)))
    other[other.length - 1] = (other.at(-1) ?? 0) ^ 1
    writeFileSync(file, other)
    expect(await here('ca', 'show', file)).toMatchObject({ code: 3 })
    for (const wrong of [
      ['--state', 'good'],
      ['--device', 'GW*'],
      ['--issuer', 'ca'],
      ['--serial', 'xyz'],
      ['--profile', 'tls'],
    ])
      expect((await here('ca', 'list', ...wrong)).code).toBe(1)
  })

  test('the calendar: what ends when, and what the server itself rests on', async () => {
    const { stdout } = await here('ca', 'calendar', '--by', 'week', '--profile', 'device-tls')
    expect(stdout).toMatch(/\d{4}-\d{2}-\d{2} to \d{4}-\d{2}-\d{2} +2 +2 device-tls by issuing/)
    for (const name of ['root', 'issuing', 'delivery-signing', 'server']) expect(stdout).toMatch(new RegExp(`^${name} +(ca|role|tls) +2`, 'm'))
    expect((await here('ca', 'calendar', '--by', 'year')).code).toBe(1)
  })

  test('the calendar: CAs first, which a person replaces; what the server replaces follows, its lists in one line unless all are asked for', async () => {
    const kindsIn = (text: string): readonly string[] => {
      const own = text.split('\n\n')[0]?.split('\n').slice(1) ?? []
      return own.map((line) => /  (ca|tls|role|ocsp|crl) +\d{4}-/.exec(line)?.[1] ?? line)
    }
    const order = ['ca', 'tls', 'role', 'ocsp', 'crl']
    const { own } = JSON.parse((await here('ca', 'calendar', '--json')).stdout) as { own: { name: string; kind: string }[] }
    const lists = own.filter(({ kind }) => kind === 'crl')
    expect(lists.length).toBeGreaterThan(1)
    const { stdout } = await here('ca', 'calendar')
    const kinds = kindsIn(stdout)
    expect(kinds).toEqual(kinds.toSorted((one, other) => order.indexOf(one) - order.indexOf(other)))
    expect(kinds.filter((kind) => kind === 'crl')).toHaveLength(1)
    expect(stdout).toMatch(new RegExp(`^${lists.length} lists \\(--all names them\\) +crl +\\d{4}-[^\\n]* the first +the server$`, 'm'))
    expect(stdout).toMatch(/^root +ca +\d{4}-[^\n]* +you: fleetkey ca prepare$/m)
    expect(stdout.indexOf('THE SERVER ITSELF')).toBe(0)
    const every = (await here('ca', 'calendar', '--all')).stdout
    expect(kindsIn(every)).toHaveLength(own.length)
    for (const { name } of own) expect(every).toMatch(new RegExp(`^${name} +(ca|tls|role|ocsp|crl) `, 'm'))
  })
})

describe('alerts', () => {
  test('none so far, and nobody to tell', async () => {
    expect(await here('alert', 'list')).toMatchObject({ code: 0, stdout: 'RAISED  TYPE  STATE  WHAT\nno webhook is configured\n' })
    expect(await here('alert', 'test')).toMatchObject({ code: 3, stderr: expect.stringContaining('no webhook is configured') as string })
  })
})

describe('doctor', () => {
  const grades = (stdout: string): Record<string, string> =>
    Object.fromEntries((JSON.parse(stdout) as { check: string; grade: string }[]).map(({ check, grade }) => [check, grade]))

  test('a healthy server: 0, and warnings for what a production server has not', async () => {
    const { code, stdout } = await here('doctor', '--json')
    expect(code).toBe(0)
    expect(grades(stdout)).toMatchObject({
      server: 'ok',
      store: 'ok',
      KMS: 'warning',
      'test endorsements': 'warning',
      'mode of cli.json': 'ok',
      'mode of kms/master.key': 'ok',
      'mode of store/fleetkey.db': 'ok',
    })
  })

  test('a secret that others can read: 5, with its remedy', async () => {
    for (const name of ['cli.json', 'kms/master.key', 'store/fleetkey.db']) {
      chmodSync(join(data(), name), 0o644)
      const { code, stdout } = await here('doctor')
      chmodSync(join(data(), name), 0o600)
      expect(code).toBe(5)
      expect(stdout).toMatch(new RegExp(`mode of ${name} +FAILURE +644 +chmod go= `))
    }
  })

  test('no server: 5', async () => expect(await here('doctor', '--server', 'https://127.0.0.1:1')).toMatchObject({ code: 5, stderr: '' }))
})

describe('answers', () => {
  test('every list is a table for people and an array with --json', async () => {
    for (const what of ['station', 'batch', 'release', 'endorsement', 'group', 'device', 'key', 'campaign', 'audit']) {
      const [human, json] = [await here(what, 'list'), await here(what, 'list', '--json')]
      expect([what, human.code, json.code]).toEqual([what, 0, 0])
      const rows = JSON.parse(json.stdout) as unknown[]
      expect(rows.length, what).toBeGreaterThan(0)
      expect(human.stdout.trimEnd().split('\n'), what).toHaveLength(rows.length + 1)
      expect(human.stdout, what).toMatch(/^[A-Z#]/)
    }
  })

  test.each([
    ['group', 'plant', { id: 'plant', members: 2 }],
    ['device', 'gw-1', { id: 'gw-1', state: 'enrolled', online: false }],
    ['batch', 'batch-1', { id: 'batch-1', rows: 2 }],
    ['key', 'telemetry', { id: 'telemetry', protection: 'sealed' }],
  ])('%s show', async (what, id, want) => {
    expect(JSON.parse((await here(what, 'show', id, '--json')).stdout)).toMatchObject(want)
    expect((await here(what, 'show', id)).stdout).toContain(id)
  })

  test('the claim window of a batch', async () => {
    const shown = async (): Promise<unknown> => (JSON.parse((await here('batch', 'show', 'batch-1', '--json')).stdout) as { claimUntil: unknown }).claimUntil
    expect(await shown()).toBeNull()
    expect((await here('batch', 'window', 'batch-1', '--claim-until', '2027-03-31')).stdout).toBe('batch batch-1 can be claimed until 2027-03-31 23:59:59Z\n')
    expect(await shown()).toBe(Date.UTC(2027, 2, 31, 23, 59, 59, 999))
    expect((await here('batch', 'window', 'batch-1', '--claim-until', '2027-04-01T12:00:00+02:00', '--json')).code).toBe(0)
    expect(await shown()).toBe(Date.UTC(2027, 3, 1, 10))
    expect((await here('batch', 'window', 'batch-9', '--claim-until', 'none')).code).toBe(3)
    expect((await here('batch', 'window', 'batch-1', '--claim-until', 'none')).stdout).toBe('batch batch-1 has no claim window\n')
    expect((await here('audit', 'list', '--json')).stdout).toMatch(/"batch\.window"/)
  })

  test('the policy of a group', async () => {
    expect((await here('group', 'policy', 'set', 'plant', '--connection-proof', 'off')).code).toBe(0)
    expect(JSON.parse((await here('group', 'policy', 'get', 'plant', '--json')).stdout)).toMatchObject({ connectionProof: false })
    expect((await here('group', 'policy', 'set', 'plant', '--connection-proof', 'on')).stdout).toMatch(/connection-proof: +on/)
  })

  test('every part of a policy, and what a change would do before it is made', async () => {
    const change = ['--minimum-release', '2', '--on-debug', 'warn', '--attest-age', '2h', '--assurance', 'simulated', '--rotate-on-quarantine', 'on']
    const preview = await here('group', 'policy', 'set', 'plant', ...change, '--dry-run', '--json')
    expect(JSON.parse(preview.stdout)).toEqual({
      judged: 2,
      quarantines: 2,
      first: [
        { device: 'gw-1', reason: 'release.below-minimum' },
        { device: 'gw-2', reason: 'release.below-minimum' },
      ],
    })
    expect((await here('group', 'policy', 'set', 'plant', ...change, '--dry-run')).stdout).toMatch(/^2 of 2 devices would be quarantined: gw-1 \(release/)
    const before = JSON.parse((await here('group', 'policy', 'get', 'plant', '--json')).stdout) as object
    expect(before).toMatchObject({ minimumRelease: 0, onDebug: 'quarantine', attestAge: 86_400, releases: 'any' })
    expect((await here('group', 'policy', 'set', 'plant', '--on-debug', 'warn', '--attest-age', '2h', '--releases', 'gateway/1.0.0')).stdout).toMatch(
      /releases: +gateway\/1\.0\.0[^]*on-debug: +warn[^]*attest-age: +7200s/,
    )
    expect((await here('group', 'policy', 'set', 'plant', '--ima', 'listed', '--on-unlisted', 'warn')).stdout).toMatch(/ima: +listed[^]*on-unlisted: +warn/)
    expect((await here('device', 'list', '--state', 'quarantined', '--json')).stdout.trim()).toBe('[]')
    expect((await here('group', 'policy', 'set', 'plant', '--ima', 'ignored', '--on-unlisted', 'quarantine')).code).toBe(0)
    expect((await here('group', 'policy', 'set', 'plant', '--releases', 'any', '--on-debug', 'quarantine', '--attest-age', '1d')).code).toBe(0)
    expect(JSON.parse((await here('group', 'policy', 'get', 'plant', '--json')).stdout)).toEqual(before)
  })

  test.each([
    [['group', 'policy', 'set', 'plant', '--on-debug', 'maybe'], '--on-debug takes quarantine, warn'],
    [['group', 'policy', 'set', 'plant', '--ima', 'on'], '--ima takes ignored, required, listed, not on'],
    [['group', 'policy', 'set', 'plant', '--releases', '1.0.0'], '--releases takes any or MODEL/NAME'],
    [['group', 'policy', 'set', 'plant', '--attest-age', '7'], '--attest-age takes a duration'],
    [['group', 'policy', 'set', 'plant'], 'name what to change'],
    [['release', 'withdraw', '1.0.0', '--dry-run'], 'MODEL/NAME'],
    [['release', 'withdraw', 'gateway/1.0.0'], '--reason TEXT'],
  ])('%s is a wrong command line', async (argv, why) => {
    const { code, stderr } = await here(...argv)
    expect([code, stderr]).toEqual([1, expect.stringContaining(why)])
  })

  test('a device says what was measured, and which generation its keys are of', async () => {
    expect((await here('device', 'show', 'gw-1')).stdout).toMatch(/measuredFiles: +-\n(.*\n)*keyGeneration: +1 of 1/)
    expect(JSON.parse((await here('device', 'show', 'gw-1', '--json')).stdout)).toMatchObject({ ima: null, keyGeneration: { keys: 1, current: 1 } })
  })

  test('a device is asked to attest, and told when it is offline', async () => {
    const { code, stdout } = await here('device', 'attest', 'gw-1')
    expect([code, stdout.trim()]).toEqual([0, 'gw-1 is offline: asked when it next connects'])
    expect((await here('device', 'attest', 'gw-9')).code).toBe(3)
  })

  test('withdrawing a release says whom it would quarantine, then does', async () => {
    expect(JSON.parse((await here('release', 'withdraw', 'gateway/1.0.0', '--dry-run', '--json')).stdout)).toMatchObject({ judged: 2, quarantines: 2 })
    expect((await here('release', 'withdraw', 'gateway/1.0.0', '--reason', 'CVE-2027-1')).stdout).toMatch(
      /^release gateway\/1\.0\.0 withdrawn; 2 of 2 devices quarantined: gw-1 \(release\.withdrawn\)/,
    )
    expect(JSON.parse((await here('device', 'list', '--state', 'quarantined', '--json')).stdout)).toMatchObject([
      { id: 'gw-1', verdict: 'contraindicated', verdictReason: 'release.withdrawn' },
      { id: 'gw-2' },
    ])
    expect((await here('device', 'show', 'gw-1')).stdout).toMatch(/quarantinedAt: +20[^]*keyGeneration: +1 of 2[^]*pcr-4 +[0-9a-f]{64}/)
    expect((await here('release', 'list')).stdout).toMatch(/CVE-2027-1/)
    const doctor = JSON.parse((await here('doctor', '--json')).stdout) as { check: string; grade: string }[]
    expect(doctor.find(({ check }) => check === 'quarantined devices')?.grade).toBe('warning')
  })

  test('a revoked device', async () => {
    const { code, stdout } = await here('device', 'revoke', 'gw-2', '--reason', 'stolen')
    expect({ code, stdout }).toEqual({ code: 0, stdout: expect.stringMatching(/^gw-2 revoked; keys rotated: telemetry/) })
    await until('it is in the list', async () => (await here('device', 'list', '--state', 'revoked')).stdout.includes('gw-2'))
  })

  test('a message is printed as JSON from its bytes, from hexadecimal and from base64', async () => {
    const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
    const signer = ecdsaSigner(privateKey, keyId(new Uint8Array(publicKey.export({ format: 'der', type: 'spki' }))))
    const body = { type: 'welcome', session: new Uint8Array(16), time: 1, reportEvery: 60 } as const
    const envelope = { v: 1, tenant: TenantId.parse('plant'), device: DeviceId.parse('gw-1'), from: 'server', id: new Uint8Array(16), seq: 1, body } as const
    const bytes = Buffer.from(await signMessage(envelope, signer))
    for (const content of [bytes, bytes.toString('hex'), bytes.toString('base64')]) {
      writeFileSync(at('message'), content)
      const { code, stdout } = await here('inspect', at('message'))
      expect(code).toBe(0)
      expect(JSON.parse(stdout)).toMatchObject({
        kind: 'message',
        verified: false,
        envelope: { device: 'gw-1', body: { type: 'welcome', session: '00'.repeat(16) } },
      })
    }
  })
})

describe('endorsements', () => {
  // One of the two boards was revoked by now, the other one may be quarantined.
  test('removal says first how many devices rest on it, and removes nothing without --yes', async () => {
    const listed = JSON.parse((await here('endorsement', 'list', '--json')).stdout) as { id: string; kind: string; test: boolean }[]
    const [row] = listed
    expect(row).toMatchObject({ kind: 'root', test: true })
    expect(await here('endorsement', 'remove', row?.id.slice(0, 16) ?? '')).toMatchObject({
      code: 3,
      stdout: expect.stringMatching(/^1 devices rest on/) as string,
    })
    expect(JSON.parse((await here('endorsement', 'list', '--json')).stdout)).toEqual(listed)
    expect(await here('endorsement', 'remove', 'ffffffff')).toMatchObject({ code: 1 })
  })

  test('deny list and firmware floors come as files, and are shown', async () => {
    writeFileSync(at('deny.json'), JSON.stringify({ deny: [{ ek: 'ab'.repeat(32) }] }))
    writeFileSync(at('firmware.json'), JSON.stringify({ floors: [{ manufacturer: 'id:49465800', minimum: '7.85' }] }))
    expect(await here('endorsement', 'import', '--deny', at('deny.json'), '--firmware', at('firmware.json'))).toMatchObject({ code: 0 })
    expect(JSON.parse((await here('endorsement', 'policy', '--json')).stdout)).toMatchObject({
      deny: [{ ek: 'ab'.repeat(32) }],
      floors: [{ manufacturer: 'id:49465800', minimum: '7.85' }],
      manufacturers: null,
    })
    writeFileSync(at('wrong.json'), JSON.stringify({ deny: [{ ek: 'short' }] }))
    expect(await here('endorsement', 'import', '--deny', at('wrong.json'))).toMatchObject({ code: 1, stderr: expect.stringContaining('--deny') as string })
    expect(await here('endorsement', 'import')).toMatchObject({ code: 1 })
  })
})

// By now gw-1 is quarantined, gw-2 revoked; both are of batch-1, which line-1 has signed.
describe('out of service: what could be read is said before, and after', () => {
  type Radius = Record<string, unknown> & { keys: { key: string; epochs: unknown[] }[] }
  const json = async (...words: string[]): Promise<Record<string, unknown> & { before: Radius; after: Radius }> => {
    const { code, stdout, stderr } = await here(...words, '--json')
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
    return JSON.parse(stdout) as never
  }
  const stateOf = async (device: string): Promise<unknown> => (await json('device', 'show', device))['state']

  test('a device: a dry run of each order changes nothing', async () => {
    for (const [order, verb] of [
      ['suspend', 'suspended'],
      ['revoke', 'revoked'],
    ] as const) {
      const said = await here('device', order, 'gw-1', '--dry-run')
      expect(said.code).toBe(0)
      expect(said.stdout).toMatch(new RegExp(`^gw-1 would be ${verb}; keys rotated: telemetry[^]*What could be read:\nstate: +quarantined[^]*KEY +PROTECTION`))
      expect(await json('device', order, 'gw-1', '--dry-run')).toMatchObject({ already: false, keys: ['telemetry'], before: { state: 'quarantined' } })
    }
    expect(await stateOf('gw-1')).toBe('quarantined')
    expect((await here('device', 'revoke', 'gw-2', '--dry-run')).stdout).toMatch(/^gw-2: nothing is left to do/)
    expect(await here('device', 'suspend', 'gw-1')).toMatchObject({ code: 1, stderr: expect.stringContaining('--reason TEXT is missing') as string })
  })

  test('a device is suspended: before, and after', async () => {
    const done = await json('device', 'suspend', 'gw-1', '--reason', 'repair')
    expect(done).toMatchObject({
      already: false,
      keys: ['telemetry'],
      before: { state: 'quarantined', identity: { until: null } },
      after: { state: 'suspended' },
    })
    expect(done.after['identity']).not.toMatchObject({ until: null })
    expect(done.after.keys.map(({ key }) => key)).toEqual(done.before.keys.map(({ key }) => key))
    expect((await here('device', 'suspend', 'gw-1', '--reason', 'again')).stdout).toMatch(
      /^gw-1 was suspended before[^]*What could be read before:[^]*And now:/,
    )
    expect((await here('device', 'reinstate', 'gw-1')).stdout).toMatch(/^gw-1 reinstated/)
  })

  test('a batch: the same for all of its devices, in counts; the keys page by page', async () => {
    const dry = await here('batch', 'revoke', 'batch-1', '--dry-run')
    expect(dry.stdout).toMatch(
      /^1 devices of batch batch-1 would be revoked; keys rotated: telemetry[^]*devices: +2 \(1 quarantined, 1 revoked\), 0 of them connected: gw-1, gw-2/,
    )
    expect(dry.stdout).toMatch(/KEY +PROTECTION +EPOCH +STATE +DEVICES/)
    expect(await json('batch', 'suspend', 'batch-1', '--dry-run')).toMatchObject({
      devices: 1,
      before: { batch: 'batch-1', standing: null, station: 'line-1' },
    })
    expect(await stateOf('gw-1')).toBe('quarantined')
    const done = await json('batch', 'suspend', 'batch-1', '--reason', 'recall')
    expect(done).toMatchObject({
      devices: 1,
      before: { standing: null, states: { quarantined: 1, suspended: 0 } },
      after: { standing: { state: 'suspended', reason: 'recall' }, states: { quarantined: 0, suspended: 1 }, keyCount: done.before['keyCount'] as number },
    })
    expect((await here('batch', 'reinstate', 'batch-1')).stdout).toMatch(/^1 devices of batch batch-1 reinstated/)
    const whole = (await json('batch', 'blast-radius', 'batch-1')) as unknown as Radius
    expect(whole).toMatchObject({ next: null })
    expect(whole.keys).toHaveLength(whole['keyCount'] as number)
    expect((await here('batch', 'blast-radius', 'batch-9')).code).toBe(3)
  })

  test('a station: what it signed, and what those devices could read; nothing of them changes', async () => {
    expect((await here('station', 'revoke', 'line-1', '--dry-run')).stdout).toMatch(
      /^station line-1 would be revoked: nothing it signs is imported any more[^]*batch +batch-1 +2[^]*What could be read:\nstation: +line-1[^]*KEY +PROTECTION/,
    )
    expect(await json('station', 'suspend', 'line-1', '--dry-run')).toMatchObject({ batches: [{ id: 'batch-1' }], before: { suspended: null, devices: 2 } })
    expect(await json('station', 'suspend', 'line-1', '--reason', 'missing')).toMatchObject({
      already: false,
      before: { suspended: null },
      after: { suspended: { reason: 'missing' }, revoked: null, batches: 1 },
    })
    expect((await here('station', 'reinstate', 'line-1')).stdout).toMatch(/^station line-1 reinstated/)
    expect((await here('station', 'blast-radius', 'line-1')).stdout).toMatch(/it signed: +1 batches, 1 releases/)
  })

  test('keys, epochs and topics in words, and what is not listed', () => {
    const at = Date.UTC(2027, 0, 1)
    const epoch = { epoch: 7, state: 'deactivated', devices: 3, heldFrom: at, heldUntil: null, usedFrom: at, usedUntil: at + 60_000 }
    const key = {
      key: KeyId.parse('telemetry'),
      protection: 'sealed' as const,
      epochs: [epoch],
      topics: [{ topic: 'plant/1/t', from: at, until: null }],
      more: { epochs: 6, topics: 2 },
    }
    const states = { registered: 0, enrolled: 2, quarantined: 0, suspended: 1, revoked: 0 }
    const recalled = { at, by: 'operator:alice', reason: 'recall', code: 'unspecified' }
    const said = batchRadiusText({
      batch: 'b1',
      station: 'line-1',
      standing: { ...recalled, state: 'suspended' },
      devices: 3,
      states,
      identity: { from: at, until: at },
      first: [DeviceId.parse('gw-1')],
      connected: 1,
      waiting: 4,
      topics: ['fk/1/gw-1/up', 'fk/1/gw-1/down'],
      keyCount: 9,
      keys: [key],
      next: 'telemetry',
    })
    expect(said).toMatch(/^standing: +suspended 2027-01-01 00:00:00Z by operator:alice: recall$/m)
    expect(said).toMatch(/^telemetry +sealed +7 +deactivated +3 +2027-01-01 00:00:00Z +- +2027-01-01 00:00:00Z +2027-01-01 00:01:00Z$/m)
    expect(said).toMatch(/^TOPIC READ +BY KEY +FROM +UNTIL\nplant\/1\/t +telemetry +2027-01-01 00:00:00Z +now$/m)
    expect(said).toMatch(/^not listed: 6 older epochs of telemetry, 2 earlier topics of telemetry$/m)
    expect(said).toMatch(/^1 of 9 keys: batch blast-radius b1$/m)
  })

  test('a CA: dry runs, and the one that signs is not suspended', async () => {
    for (const order of ['suspend', 'revoke'])
      expect((await here('ca', order, 'issuing', '--dry-run')).stdout).toMatch(/issuing CA: +[^]*accepted: +20[^]*until now[^]*KEY +PROTECTION/)
    expect(await here('ca', 'suspend', 'issuing', '--reason', 'x')).toMatchObject({ code: 3, stdout: '' })
    expect(await json('ca', 'blast-radius', 'issuing', '--limit', '1')).toMatchObject({ generation: 1, suspended: null, revoked: null })
  })
})

describe('output', () => {
  const terminal = (isTTY: boolean) => {
    let [stdout, stderr] = ['', '']
    const err = { isTTY, columns: 20, write: (text: string) => ((stderr += text), true) } as unknown as NodeJS.WriteStream
    return { out: createOutput(false, { write: (text) => (stdout += text) }, err), stdout: () => stdout, stderr: () => stderr }
  }

  test('progress is on stderr of a terminal only, in place, no wider than it, and gone before the result', () => {
    const { out, stdout, stderr } = terminal(true)
    out.progress('installing wave 1/3 and more')
    expect(stderr()).toBe('\r\x1B[2Kinstalling wave 1/3')
    out.result({}, () => 'done')
    expect(stderr().endsWith('\r\x1B[2K')).toBe(true)
    expect(stdout()).toBe('done\n')
    const pipe = terminal(false)
    pipe.out.progress('installing')
    pipe.out.result({}, () => 'done')
    expect(pipe.stderr()).toBe('')
  })

  test('a name cannot steer the terminal', () => expect(table([['NAME'], ['\x1B[2Jx\u202E']])).toBe('NAME\n\uFFFD[2Jx\uFFFD'))
})
