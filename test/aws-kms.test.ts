import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import { existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { readSettings } from '@fleetkey/server/config.ts'
import { kmsOf } from '@fleetkey/server/kms/custody.ts'
import type { Kms } from '@fleetkey/server/flows/context.ts'
import type { Backend } from '@fleetkey/server/kms/orders.ts'
import { openAwsHolder } from '@fleetkey/server/kms/aws/holder.ts'
import { startKms, type SupervisedKms } from '@fleetkey/server/kms/supervisor.ts'
import { awsBackend, startAwsKms, type AwsKms } from './aws-kms.ts'
import { moveFromFiles } from './moving.ts'
import { hasProgram } from './programs.ts'
import { openWorld, until, using } from './world.ts'

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text)

let aws: AwsKms
let folder: string
const before = { ...process.env }
beforeEach(async () => {
  aws = await startAwsKms()
  folder = mkdtempSync(join(tmpdir(), 'fk-aws-'))
  Object.assign(process.env, aws.credentials)
})
afterEach(async () => {
  for (const name of ['AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY']) {
    if (before[name] === undefined) delete process.env[name]
    else process.env[name] = before[name]
  }
  await aws.stop()
  rmSync(folder, { recursive: true, force: true })
})

/** In this process, so that it can be ended at a step. */
const open = async (how: { readonly step?: (name: string) => void; readonly notice?: (problem: Problem | null) => void } = {}): Promise<Kms> =>
  kmsOf(await openAwsHolder({ folder, region: aws.region, endpoint: aws.endpoint, ...how }))

const signing = async (kms: Kms): Promise<readonly Uint8Array[]> => await kms.sign([{ key: 'a', purpose: 'delivery-signing', data: bytes('x') }])

describe('requests', () => {
  test.skipIf(!hasProgram('curl'))('curl, which signs by itself, is understood by the test server; a changed secret, target or region is not', async () => {
    const ask = async (of: { readonly secret?: string; readonly region?: string; readonly target?: string } = {}): Promise<string> => {
      const { stdout } = await promisify(execFile)('curl', [
        '--silent',
        '--aws-sigv4',
        `aws:amz:${of.region ?? aws.region}:kms`,
        '--user',
        `${aws.credentials.AWS_ACCESS_KEY_ID}:${of.secret ?? aws.credentials.AWS_SECRET_ACCESS_KEY}`,
        '-H',
        'content-type: application/x-amz-json-1.1',
        '-H',
        `x-amz-target: TrentService.${of.target ?? 'ListKeys'}`,
        '--data',
        '{}',
        `${aws.endpoint}/`,
      ])
      return stdout
    }
    expect(JSON.parse(await ask())).toEqual({ Keys: [], Truncated: false })
    expect(await ask({ secret: 'another' })).toContain('InvalidSignatureException')
    expect(await ask({ region: 'us-east-1' })).toContain('InvalidSignatureException')
    expect(await ask({ target: 'DeleteAlias' })).toContain('UnknownOperationException')
  })

  test('keys are tagged and described, so that their owner knows them', async () => {
    const kms = await open()
    await kms.create('issuing-ca', 'issuing-ca')
    await kms.create('kek', 'kek')
    expect(aws.keys().map(({ tags }) => [tags['fleetkey-key'], tags['fleetkey-purpose']])).toEqual([
      ['issuing-ca', 'issuing-ca'],
      ['kek', 'kek'],
    ])
    expect(new Set(aws.keys().map(({ tags }) => tags['fleetkey-namespace'])).size).toBe(1)
    await kms.close()
  })

  test('refused bursts are asked again', async () => {
    const kms = await open()
    await kms.create('a', 'delivery-signing')
    aws.fail('Sign', { error: 'ThrottlingException' }, 2)
    expect(await signing(kms)).toHaveLength(1)
    expect(aws.asked.get('Sign')).toBe(3)
    await kms.close()
  })

  test('fifty at once go one after the other where need be, in their order', async () => {
    const kms = await open()
    await kms.create('kek', 'kek')
    const context = bytes('c')
    const texts = Array.from({ length: 50 }, (_, at) => `secret ${at}`)
    const wrapped = await kms.wrap(texts.map((text) => ({ key: 'kek', plaintext: new Secret(bytes(text)), context })))
    const opened = await kms.unwrap(wrapped.map((one) => ({ key: 'kek', wrapped: one, context })))
    expect(opened.map((secret) => Buffer.from(secret.bytes()).toString())).toEqual(texts)
    await expect(kms.wrap([{ key: 'kek', plaintext: new Secret(new Uint8Array(4096)), context }])).rejects.toMatchObject({ reason: 'kms.size' })
    await kms.close()
  })
})

describe('what goes wrong', () => {
  test('another key in the place of one: its signatures are not used, and the next start refuses it', async () => {
    const kms = await open()
    await kms.create('a', 'delivery-signing')
    aws.exchange(aws.keys()[0]?.arn ?? '')
    await expect(signing(kms)).rejects.toMatchObject({ code: 'unavailable', message: expect.stringContaining('does not verify') })
    await kms.close()
    await expect(open()).rejects.toMatchObject({ code: 'internal', reason: 'kms.tampered' })
  })

  test('a key that is disabled is told once, and that it is back', async () => {
    const told: (string | null)[] = []
    const kms = await open({ notice: (problem) => void told.push(problem?.reason ?? null) })
    await kms.create('a', 'delivery-signing')
    const arn = aws.keys()[0]?.arn ?? ''
    aws.setState(arn, 'Disabled')
    for (let times = 0; times < 2; times++) await expect(signing(kms)).rejects.toMatchObject({ code: 'unavailable', reason: 'kms.aws-key' })
    await expect(open()).rejects.toMatchObject({ reason: 'kms.aws-key' })
    aws.setState(arn, 'Enabled')
    await signing(kms)
    expect(told).toEqual(['kms.aws-key', null])
    await kms.close()
  })

  test('no rights: told as that', async () => {
    const kms = await open()
    await kms.create('a', 'delivery-signing')
    aws.fail('Sign', { error: 'AccessDeniedException' })
    await expect(signing(kms)).rejects.toMatchObject({ reason: 'kms.aws-credentials' })
    await signing(kms)
    await kms.close()
  })

  test('a lost answer makes no second key: it is asked once, and found again', async () => {
    const kms = await open()
    for (const name of ['b', 'c', 'd', 'e']) await kms.create(name, 'audit-signing')
    aws.fail('CreateKey', 'lose')
    await expect(kms.create('a', 'delivery-signing')).rejects.toMatchObject({ code: 'unavailable', reason: 'kms.aws' })
    const made = await kms.create('a', 'delivery-signing')
    expect(aws.keys()).toHaveLength(5)
    expect(await signing(kms)).toHaveLength(1)
    await kms.close()
    expect((await (await open()).describe('a'))?.spki).toEqual(made.spki)
  })

  test.each(['kms.attempt', 'kms.generated', 'kms.key'])('a crash at %s leaves at most the key that the next start uses', async (where) => {
    const kms = await open({
      step: (name) => {
        if (name === where) throw new Error('killed')
      },
    })
    await expect(kms.create('a', 'delivery-signing')).rejects.toThrow('killed')
    const again = await open()
    await again.create('a', 'delivery-signing')
    await signing(again)
    expect(aws.keys()).toHaveLength(1)
    await again.close()
  })

  test.each(['kms.ending', 'kms.destroyed'])('a crash at %s: the next start finishes the end of the key', async (where) => {
    const kms = await open({
      step: (name) => {
        if (name === where) throw new Error('killed')
      },
    })
    await kms.create('a', 'delivery-signing')
    await expect(kms.destroy('a')).rejects.toThrow('killed')
    expect(await (await open()).list()).toEqual([])
    expect(aws.keys().map(({ state }) => state)).toEqual(['PendingDeletion'])
    expect(readdirSync(folder).filter((name) => name.endsWith('.aws.cbor'))).toEqual([])
  })

  test('not reached at the start: sealed, until it is; files do not take its place', { timeout: 60_000 }, async () => {
    const log: string[] = []
    const start = async (backend: Backend): Promise<SupervisedKms> =>
      await startKms({ folder: join(folder, 'kms'), backend, log: (line) => void log.push(line) })
    const wrong = await start({ ...awsBackend(aws), variables: { ...aws.credentials, AWS_SECRET_ACCESS_KEY: 'another' } })
    expect(wrong.health()).toMatchObject({ open: false, sealed: true, reason: expect.stringContaining('InvalidSignatureException') })
    await expect(wrong.create('a', 'delivery-signing')).rejects.toMatchObject({ reason: 'kms.sealed' })
    // Tried again and again, told once.
    const tries = aws.asked.get('ListKeys') ?? 0
    await until('it was tried again', () => (aws.asked.get('ListKeys') ?? 0) > tries + 2, 30_000)
    expect(log.filter((line) => line.startsWith('ALARM'))).toHaveLength(1)
    await wrong.close()
    aws.fail('ListKeys', { error: 'KMSInternalException', status: 500 }, 4)
    const kms = await start(awsBackend(aws))
    expect(kms.health()).toMatchObject({ open: false, sealed: true })
    await until('it is open', () => kms.health().open, 30_000)
    await kms.create('a', 'delivery-signing')
    await kms.close()
    await expect(start({ kind: 'file', passphraseFile: null, keyFile: null })).rejects.toMatchObject({ message: expect.stringContaining('--kms aws') })
    expect(log.join('\n')).not.toContain(aws.credentials.AWS_SECRET_ACCESS_KEY)
  })
})

describe('settings', () => {
  const read = (args: readonly string[], env: NodeJS.ProcessEnv = {}) => readSettings(['--kms', 'aws', ...args], env).backend
  test('region, endpoint and credentials', () => {
    expect(read(['--aws-region', 'eu-central-1'], { AWS_PROFILE: 'factory', PATH: '/bin' })).toMatchObject({
      kind: 'aws',
      region: 'eu-central-1',
      endpoint: null,
      variables: { AWS_PROFILE: 'factory' },
    })
    expect(read([], { AWS_REGION: 'us-gov-west-1', AWS_ENDPOINT_URL_KMS: 'https://kms.example' })).toMatchObject({ endpoint: 'https://kms.example' })
    expect(() => read([])).toThrow('--aws-region')
    expect(() => read(['--aws-region', 'Frankfurt'])).toThrow('--aws-region')
  })
  test('never in the clear to another machine', () => {
    for (const endpoint of ['http://kms.example', 'ftp://127.0.0.1', 'kms.example', 'http://127.0.0.1.example'])
      expect(() => read(['--aws-region', 'eu-central-1', '--aws-endpoint', endpoint])).toThrow('https://')
  })
})

test('a whole server on it: a device enrols and its key is rotated; a restart finds everything there', { timeout: 120_000 }, async () => {
  const world = await openWorld({ args: ['--kms', 'aws', '--aws-region', aws.region, '--aws-endpoint', aws.endpoint], env: aws.credentials })
  try {
    const machine = await world.simulated('GATEWAY-1')
    await world.enlist([machine], 'plant')
    await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
    await world.client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
    const agent = world.agent(machine)
    await until('it uses its key', () => using([agent], 'telemetry', 1), 60_000)
    await world.client.call('key.rotate', { params: { id: 'telemetry' }, body: {} })
    await until('it uses the next', () => using([agent], 'telemetry', 2), 60_000)
    const kept = join(world.folder, 'server', 'kms')
    expect(existsSync(join(kept, 'master.key'))).toBe(false)
    expect(readdirSync(kept).some((name) => name.endsWith('.key.cbor'))).toBe(false)
    expect(aws.keys().map(({ tags }) => tags['fleetkey-purpose'])).toEqual(expect.arrayContaining(['root-ca', 'issuing-ca', 'kek', 'audit-signing']))
    await world.restart()
    await until('it is back', () => agent.status().connected === true, 60_000)
  } finally {
    await world.stop()
  }
})

test('a server moves from files to it: CA and KEK, with its fleet connected; the keys in files are gone', { timeout: 240_000 }, async () => {
  const options = ['--kms', 'aws', '--aws-region', aws.region, '--aws-endpoint', aws.endpoint]
  expect(await moveFromFiles({ options, env: aws.credentials, place: 'aws' })).toMatchObject({ 'root-ca-2': 'aws', 'issuing-ca-2': 'aws', 'kek-2': 'aws' })
  expect(aws.keys().map(({ tags, state }) => [tags['fleetkey-key'], state])).toEqual([
    ['root-ca-2', 'Enabled'],
    ['issuing-ca-2', 'Enabled'],
    ['kek-2', 'Enabled'],
  ])
})
