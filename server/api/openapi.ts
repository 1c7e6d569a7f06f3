import { operations, ProblemView, type Operation } from '@fleetkey/protocol/admin.ts'
import { z } from 'zod'

const schemaOf = (schema: z.ZodType, io: 'input' | 'output'): unknown => {
  const { $schema: _, ...rest } = z.toJSONSchema(schema, { io, target: 'draft-2020-12' })
  return rest
}

const parametersOf = (operation: Operation): unknown[] => [
  ...[...operation.path.matchAll(/\{(\w+)\}/g)].map(([, name]) => ({ name, in: 'path', required: true, schema: { type: 'string' } })),
  ...Object.entries(operation.query?.shape ?? {}).map(([name, schema]) => ({
    name,
    in: 'query',
    required: false,
    schema: schemaOf(schema as z.ZodType, 'input'),
  })),
]

const describe = (name: string, operation: Operation): unknown => ({
  operationId: name,
  summary: operation.summary,
  tags: [name.split('.')[0]],
  ...(operation.open === true ? { security: [] } : {}),
  parameters: parametersOf(operation),
  ...(operation.body === undefined ? {} : { requestBody: { required: true, content: { 'application/json': { schema: schemaOf(operation.body, 'input') } } } }),
  responses: {
    200: { description: 'Done', content: { 'application/json': { schema: schemaOf(operation.response, 'output') } } },
    default: { description: 'Refused (RFC 9457)', content: { 'application/problem+json': { schema: schemaOf(ProblemView, 'output') } } },
  },
})

/** OpenAPI 3.1 of the admin API, from the same schemas that parse the requests. */
export const openApi = (): unknown => {
  const paths: Record<string, Record<string, unknown>> = {}
  for (const [name, operation] of Object.entries<Operation>(operations))
    (paths[operation.path] ??= {})[operation.method.toLowerCase()] = describe(name, operation)
  paths['/api/1/audit/export'] = {
    get: {
      operationId: 'audit.export',
      summary: 'The whole audit log as JSON lines: origin, entries, newest signed checkpoint',
      tags: ['audit'],
      responses: { 200: { description: 'JSON lines', content: { 'application/jsonl': { schema: { type: 'string' } } } } },
    },
  }
  return {
    openapi: '3.1.0',
    info: { title: 'Fleetkey admin API', version: '1', description: 'Times are milliseconds since 1970 (UTC), bytes are base64 text.' },
    security: [{ token: [] }],
    components: { securitySchemes: { token: { type: 'http', scheme: 'bearer' } } },
    paths,
  }
}
